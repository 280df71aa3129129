"""How many test rows routers send to the expert of their task, and how many rows of unseen tasks they reject.

Routers learn from a number of inputs a task, drawn anew for each draw from the training and validation rows; every test
row is then scored twice: whole, and without its instruction, which is all but its last line and what stands there
before the first `: `. No expert is needed. `--unseen` takes tasks that no router learns.

    python benchmarks/own_expert.py .cache/smollm2 data/snips_intent.jsonl ... --unseen data/banking77.jsonl ... \
        [--encoder .cache/minilm] [--rows 16 64 250] [--draws 5] [--json FILE]       two hours for fifteen tasks

With `--encoder` a fourth router is `KernelRidge` with this encoder of sentences (`make minilm`).
"""

import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import Parser
from torch import Tensor

from modular_experts import Base
from modular_experts.base.sentence_encoder import SentenceEncoder
from modular_experts.data import TaskMixture
from modular_experts.merging.statistics import batches_by_length, prompt_statistics
from modular_experts.routing import Centroid, Classifier, KernelRidge, Router
from modular_experts.routing.router import GRAMS

ROUTERS = {"Centroid": Centroid, "Classifier": Classifier, "KernelRidge": KernelRidge}
WITH_ENCODER = "KernelRidge with the encoder"


def read(
    model: Any,
    data: TaskMixture,
    splits: Sequence[str],
    encoder: SentenceEncoder | None = None,
    parts: bool = False,
) -> list[Tensor]:
    """Return the vectors of each task's inputs `(rows, size)`, with their n-grams; with parts `(rows, 2, size)`."""
    found = []
    for examples in data.input_examples(splits).values():
        measured = prompt_statistics(model, batches_by_length(examples, data), parts, Router.depths, encoder)
        vectors = torch.cat([one.values for one in measured.values()], 1)
        found.append(vectors.unflatten(0, (-1, 2)) if parts else vectors)
    return found


def without_instruction(file: Path, folder: Path) -> Path:
    """Write a copy of a task's rows whose inputs lack their instruction."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    own = [row | {"input": row["input"].split("\n")[-1].split(": ", 1)[-1]} for row in rows]
    (folder / file.name).write_text("".join(json.dumps(row) + "\n" for row in own))
    return folder / file.name


def compare(
    learned: Sequence[Tensor], tested: Sequence[Sequence[Tensor]], name: str, hidden: int, encoded: int, reject: float
) -> dict[str, float]:
    """Return shares in %, each the mean over the tasks, of rows of known tasks, the same stripped, and unseen ones.

    The first columns are `hidden` states, the next `encoded` ones of the encoder, and the last n-grams.
    """
    with_encoder = name == WITH_ENCODER
    # The encoder has read the prompts already; its name alone changes a default of the router.
    router: Any = KernelRidge(reject=reject, encoder=name) if with_encoder else ROUTERS[name](reject=reject)
    columns = [*range(hidden + encoded * with_encoder)]
    if router.reads_grams:
        columns += range(hidden + encoded, hidden + encoded + GRAMS)
    read_by_it = torch.tensor(columns)
    parts = router.needs == "prompt_parts"
    given = [pairs.flatten(0, 1) if parts else pairs[:, 0] for pairs in learned]
    router.learn([], [rows[:, read_by_it] for rows in given])

    def mean(shares: Sequence[Tensor]) -> float:
        return 100 * statistics.fmean(float(share.float().mean()) for share in shares) if shares else 0.0

    rejected = [[router(rows[:, read_by_it]).ids[:, 0] == len(learned) for rows in part] for part in tested]
    right = [
        [router.scores(rows[:, read_by_it]).argmax(1) == number for number, rows in enumerate(part)]
        for part in tested[:2]
    ]
    names = ("own rejected", "stripped rejected", "unseen rejected")
    found = {"own": mean(right[0]), "stripped": mean(right[1])}
    return found | dict(zip(names, map(mean, rejected), strict=True))


def main() -> None:
    parser = Parser(__doc__)
    examples = sorted(Path(__file__).parents[1].glob("examples/*.jsonl"))
    parser.add_argument("base", nargs="?", default=".cache/smollm2")
    parser.add_argument("tasks", nargs="*", type=Path, default=examples)
    parser.add_argument("--unseen", nargs="*", type=Path, default=[])
    parser.add_argument("--encoder")
    parser.add_argument("--reject", type=float, default=0.01)
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64, 250])
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    base = Base.open(options.base)
    model, tokenizer = base.load("float32"), base.tokenizer()
    data = TaskMixture(options.tasks, tokenizer)
    encoder = SentenceEncoder(options.encoder) if options.encoder else None
    pool = read(model, data, ["train", "validation"], encoder, parts=True)
    encoded = 0 if encoder is None else encoder(model, [[0]]).shape[1]
    hidden = pool[0].shape[-1] - encoded - GRAMS
    with tempfile.TemporaryDirectory() as folder:
        stripped = TaskMixture([without_instruction(file, Path(folder)) for file in options.tasks], tokenizer)
        tested = [read(model, one, ["test"], encoder) for one in (data, stripped)]
    tested.append(read(model, TaskMixture(options.unseen, tokenizer), ["test"], encoder) if options.unseen else [])
    print("| inputs a task | router | own expert, % | stripped, % | own rejected, % | stripped rejected, % |", end="")
    print(" unseen rejected, % |\n|---|---|---|---|---|---|---|")
    rows = []
    for count in options.rows:
        for name in [*ROUTERS, *([WITH_ENCODER] if encoder else [])]:
            found = []
            for draw in range(options.draws):
                made = torch.Generator().manual_seed(draw)
                drawn = [inputs[torch.randperm(len(inputs), generator=made)[:count]] for inputs in pool]
                found.append(compare(drawn, tested, name, hidden, encoded, options.reject))
            rows.append({"rows": count, "router": name, "draws": found})
            cells = [f"{statistics.fmean(one[key] for one in found):.1f}" for key in found[0]]
            print(f"| {count} | `{name}` | {' | '.join(cells)} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
