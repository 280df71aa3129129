"""Whether experts that act on the answer alone are as good as ordinary ones, in as many steps or as much CPU time.

An answer-only expert acts from the last token of the prompt on. The base alone reads what stands before, once: keys and
values of these tokens are kept. An ordinary expert reads the whole row in each step. Both get the same rows in the same
order, packed, and logits of the answers alone; exact match is counted on the test rows, by the likeliest tokens.

    python benchmarks/answer_only.py .cache/smollm2 data/snips_intent.jsonl ... [--kind lora|sparse] [--seeds 0 1] \
        [--acts 1 4 8] [--same steps|time] [--steps 60] [--dtype bfloat16] [--json FILE]      two minutes a training

For bases with the blocks of Llama, on one thread. Nothing of it is in the package.
"""

import json
import random
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measuring import Parser
from torch import Tensor
from torch.nn import functional as F

from modular_experts import Base, LoRAExpert, SparseExpert, inject
from modular_experts.injection.inject import named_experts

RATES = {"lora": 3e-3, "sparse": 1e-3}
BATCH = 8
KEEP = 0.05
WARMUP = 8
ANSWER = -100


class Row(NamedTuple):
    """A row's tokens: of its prompt, and of its answer with the end of sequence."""

    prompt: list[int]
    answer: list[int]


class Score(NamedTuple):
    """Exact match in %, and the mean loss of a row's answer."""

    exact: float
    loss: float


class Run:
    """One training of an ordinary expert (`acts` 0), or of one that acts on the answer and `acts` tokens before it."""

    def __init__(self, base: Base, rows: dict[str, list[Row]], kind: str, acts: int, seed: int, dtype: Any) -> None:
        torch.manual_seed(seed)
        self.model: Any = base.load(dtype)
        self.rows = rows
        self.kind = kind
        self.acts = acts
        self.seed = seed
        # Keys and values of every block, `(key heads, tokens, size)`, of what the base alone reads of a prompt.
        self.kept: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        if kind == "lora":
            inject(self.model, partial(LoRAExpert, rank=16, alpha=16), "all-linear")
        else:
            self._inject_entries()
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=RATES[kind], weight_decay=0)

    def _inject_entries(self) -> None:
        """Train the entries with the largest gradients of one batch."""
        layers: dict[str, Any] = {
            name: layer
            for name, layer in self.model.named_modules()
            if isinstance(layer, torch.nn.Linear) and name != "lm_head"
        }
        for layer in layers.values():
            layer.weight.requires_grad_(True)
        drawn = random.Random(self.seed + 1000)
        self.loss(drawn.sample(self.rows["train"], BATCH)).backward()
        units = {}
        for name, layer in layers.items():
            size = layer.weight.grad.abs().flatten()
            units[name] = size.topk(int(KEEP * size.numel())).indices.sort().values
            layer.weight.grad = None
            layer.weight.requires_grad_(False)
        inject(self.model, partial(SparseExpert, keep_ratio=KEEP), "all-linear")
        experts: dict[str, Any] = dict(named_experts(self.model))
        for name, expert in experts.items():
            layer = name.removesuffix(".weight")
            expert.resize(self.model.get_submodule(layer).weight, units[layer])

    def passive(self, row: Row) -> tuple[int, ...]:
        """Return the tokens that the base alone reads."""
        return tuple(row.prompt[: -self.acts]) if self.acts else ()

    @torch.no_grad()
    def read(self, rows: Sequence[Row]) -> None:
        """Keep the keys and values of the rows' passive tokens."""
        fresh = [tokens for tokens in dict.fromkeys(map(self.passive, rows)) if tokens and tokens not in self.kept]
        for start in range(0, len(fresh), BATCH):
            group = fresh[start : start + BATCH]
            owner, place = _numbered(group, [0 for _ in group])
            x = self.model.model.embed_tokens(torch.tensor([token for tokens in group for token in tokens]))
            mask = (owner[:, None] == owner) & (place[:, None] >= place)
            of_blocks = []
            for block in self.model.model.layers:
                x, own = self._block(block, x, place, mask, None)
                of_blocks.append([part.split([len(tokens) for tokens in group], 1) for part in own])
            for number, tokens in enumerate(group):
                self.kept[tokens] = [(keys[number].clone(), values[number].clone()) for keys, values in of_blocks]

    def _block(
        self, block: Any, x: Tensor, place: Tensor, mask: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return a block's output for tokens `(n, hidden)`, and their keys and values."""
        attention = block.self_attn
        size = attention.head_dim
        hidden = block.input_layernorm(x)
        layers = (attention.q_proj, attention.k_proj, attention.v_proj)
        query, key, value = (layer(hidden).view(len(x), -1, size).transpose(0, 1) for layer in layers)
        cos, sin = (part[0] for part in self.model.model.rotary_emb(x[None], place[None]))
        query, key = _turned(query, cos, sin), _turned(key, cos, sin)
        keys, values = key, value
        if past is not None:
            keys, values = torch.cat([past[0], key], 1), torch.cat([past[1], value], 1)
        mixed = F.scaled_dot_product_attention(query[None], keys[None], values[None], attn_mask=mask, enable_gqa=True)
        x = x + attention.o_proj(mixed[0].transpose(0, 1).reshape(len(x), -1))
        return x + block.mlp(block.post_attention_layernorm(x)), (key, value)

    def _logits(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """Return the logits that predict the answers of rows, one behind the other, and the answers' tokens."""
        self.read(rows)
        passive = [self.passive(row) for row in rows]
        active = [[*row.prompt, *row.answer][len(tokens) : -1] for row, tokens in zip(rows, passive, strict=True)]
        owner, place = _numbered(active, [len(tokens) for tokens in passive])
        earlier_owner, earlier_place = _numbered(passive, [0 for _ in passive])
        all_owners = torch.cat([earlier_owner, owner])
        all_places = torch.cat([earlier_place, place])
        mask = (owner[:, None] == all_owners) & (place[:, None] >= all_places)
        x = self.model.model.embed_tokens(torch.tensor([token for tokens in active for token in tokens]))
        kept = [self.kept[tokens] for tokens in passive if tokens]
        for number, block in enumerate(self.model.model.layers):
            past = None
            if kept:
                past = (torch.cat([of[number][0] for of in kept], 1), torch.cat([of[number][1] for of in kept], 1))
            x, _ = self._block(block, x, place, mask, past)
        labels = torch.tensor(
            [
                label
                for row, tokens in zip(rows, active, strict=True)
                for label in [*[ANSWER] * (len(tokens) - len(row.answer)), *row.answer]
            ]
        )
        answered = labels != ANSWER
        return self.model.lm_head(self.model.model.norm(x[answered])).float(), labels[answered]

    def loss(self, rows: Sequence[Row]) -> Tensor:
        return F.cross_entropy(*self._logits(rows))

    def step(self, rows: Sequence[Row]) -> None:
        self.loss(rows).backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def order(self, steps: int) -> list[Row]:
        """Return the rows of so many steps: the training rows again and again, shuffled each time."""
        drawn = random.Random(self.seed)
        rows = self.rows["train"]
        order: list[Row] = []
        while len(order) < steps * BATCH:
            order += drawn.sample(rows, len(rows))
        return order[: steps * BATCH]

    def train(self, steps: int) -> float:
        """Train, and return the CPU seconds, also of reading the prompts, which comes before the weights move."""
        self.read(self.rows["validation"] + self.rows["test"])
        start = time.process_time()
        order = self.order(steps)
        self.read(order)
        shape = partial(_rate, steps=steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, shape)
        for number in range(steps):
            self.step(order[number * BATCH : (number + 1) * BATCH])
            schedule.step()
        return time.process_time() - start

    def pace(self) -> float:
        """Return the CPU seconds of a step on rows of which some may be new; the expert is spoilt for training."""
        drawn = random.Random(self.seed + 7)
        batches = [drawn.sample(self.rows["train"], BATCH) for _ in range(6)]
        self.step(batches[0])
        start = time.process_time()
        for rows in batches[1:]:
            self.step(rows)
        return (time.process_time() - start) / (len(batches) - 1)

    @torch.no_grad()
    def score(self, split: str) -> Score:
        exact: list[bool] = []
        losses: list[float] = []
        rows = self.rows[split]
        for start in range(0, len(rows), 20):
            part = rows[start : start + 20]
            logits, labels = self._logits(part)
            lengths = [len(row.answer) for row in part]
            hits = (logits.argmax(1) == labels).split(lengths)
            exact += [bool(hit.all()) for hit in hits]
            of_tokens = F.cross_entropy(logits, labels, reduction="none").split(lengths)
            losses += [float(loss.mean()) for loss in of_tokens]
        return Score(100 * sum(exact) / len(exact), sum(losses) / len(losses))


def _rate(step: int, steps: int) -> float:
    """Return the share of the peak rate: a linear rise, then a linear fall."""
    return min(1.0, (step + 1) / WARMUP) * max(0.02, 1 - step / steps)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def _numbered(rows: Sequence[Sequence[int]], first: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the row of each token, and its place in it, counted from the row's `first` one."""
    owners = [number for number, tokens in enumerate(rows) for _ in tokens]
    places = [start + place for start, tokens in zip(first, rows, strict=True) for place in range(len(tokens))]
    return torch.tensor(owners, dtype=torch.long), torch.tensor(places, dtype=torch.long)


def read_rows(file: Path, tokenizer: Any) -> dict[str, list[Row]]:
    rows: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    for line in file.read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["input"], add_special_tokens=False)["input_ids"][-200:]
        answer = tokenizer(f" {row['target']}", add_special_tokens=False)["input_ids"]
        rows[row["split"]].append(Row(prompt, [*answer, tokenizer.eos_token_id]))
    return rows


def steps_in(budget: float, run: Run) -> int:
    """Return how many steps take so many CPU seconds; from the second epoch on the prompts are kept."""
    fresh = run.pace()
    kept = run.pace()
    epoch = len(run.rows["train"]) // BATCH
    if budget < fresh * epoch:
        return max(1, int(budget / fresh))
    return epoch + int((budget - fresh * epoch) / kept)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("base")
    parser.add_argument("tasks", nargs="+", type=Path)
    parser.add_argument("--kind", choices=list(RATES), default="lora")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--acts", type=int, nargs="+", default=[1])
    parser.add_argument("--same", choices=["steps", "time"], default="time")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    base = Base.open(options.base)
    found = []
    print("| task | seed | acts on | steps | exact match, % | loss | CPU beside the first |")
    print("|---|---|---|---|---|---|---|")
    for file in options.tasks:
        rows = read_rows(file, base.tokenizer())
        for seed in options.seeds:
            make = partial(Run, base, rows, options.kind, seed=seed, dtype=options.dtype)
            budget = make(acts=0).pace() * options.steps
            ordinary = 0.0
            for acts in [0, *options.acts]:
                steps = options.steps if not acts or options.same == "steps" else steps_in(budget, make(acts=acts))
                run = make(acts=acts)
                seconds = run.train(steps)
                ordinary = ordinary or seconds
                score = run.score("test")
                what = f"the answer and {acts} before" if acts else "the row"
                line = f"| {file.stem} | {seed} | {what} | {steps} | {score.exact:.1f} | {score.loss:.3f} |"
                print(f"{line} {seconds / ordinary:.2f} |", flush=True)
                found.append({"task": file.stem, "seed": seed, "acts": acts, "steps": steps, "exact": score.exact})
                found[-1] |= {"loss": score.loss, "cpu": seconds, "validation": run.score("validation").exact}
                if options.json:
                    options.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
