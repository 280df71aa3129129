"""What rows of a batch with experts of their own cost beside the base alone: time of prefill and decoding, and memory.

A Llama of 135 million parameters with random weights passes 8 rows forward, each with another expert at every
projection: entries and tiles of 16 at 5 %, LoRA of rank 16 (4.6 %), the same three stored in int4, and PEFT's mixed
batch of the same LoRA (`adapter_names`). Each prefill decodes its stored experts anew. `Arrow` chooses three of the
eight LoRAs for each token at each projection, here and in PEFT. Prefill takes 64 or 128 tokens a row, decoding one
token after 64. All run in turn on one thread, in an order drawn anew for each round; the numbers are ratios of medians
of CPU time. The floor counts operations in prefill, and in decoding the bytes of the experts over those of the base.

Memory is the growth of a process of its own from 20 experts of a kind, over their values and places as packed (two
bytes a place of an entry, four a tile): what the mixtures hold, and the peak of a forward pass over that of the base;
and the bytes of the base with what the mixtures hold, before and after a pass that uses eight experts, over the base's.

    python benchmarks/routing_cost.py [--dtype float32 bfloat16] [--json] [--quick]     10 minutes; --quick: in small
"""

import argparse
import copy
import inspect
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from contenders import PROJECTIONS, language_model
from measuring import Parser, high_water, in_own_process, medians, output, print_machine
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM

from modular_experts.deltas import BlockSparse, Delta, LowRank, Sparse
from modular_experts.deltas.tiles import tile_grid
from modular_experts.injection.routed import routed
from modular_experts.library import make_record, open_expert, write_expert
from modular_experts.routing import Arrow, Mixture

KINDS = ["entries", "tiles", "LoRA"]
ENCODED = "int4"
ARROWS = ["Arrow", "PEFT Arrow"]
RECORD = make_record("SparseExpert", {"id": "none", "revision": None, "fingerprint": "0" * 64})
ROWS, KEPT, TILE, RANK, PROMPT, MANY = 8, 0.05, 16, 16, 64, 20
WORKS = {"prefill 64": 64, "prefill 128": 128, "decode": 1}
GOALS = {"entries": 1.5, "tiles": 1.5, "LoRA": 1.3}


class RandomExpert(Mapping[str, Delta]):
    """An expert of every projection of a model, made weight by weight when asked for."""

    def __init__(self, model: nn.Module, kind: str, number: int) -> None:
        self.kind, self.number = kind, number
        weights = {name: parameter for name, parameter in model.named_parameters() if name.endswith("proj.weight")}
        self.shapes = {name: weight.shape for name, weight in weights.items()}

    def __getitem__(self, name: str) -> Delta:
        shape, draw = self.shapes[name], torch.Generator().manual_seed(1000 * self.number + len(name))
        if self.kind == "LoRA":
            up, down = (torch.randn(size, generator=draw) for size in ((shape[0], RANK), (RANK, shape[1])))
            return LowRank(0.01 * up, 0.01 * down)
        tile = (TILE, TILE) if self.kind == "tiles" else (1, 1)
        units = math.prod(tile_grid(shape, tile))
        kept = torch.randperm(units, generator=draw)[: round(KEPT * units)].sort().values.int()
        if self.kind == "entries":
            return Sparse(kept, 0.01 * torch.randn(len(kept), generator=draw), shape)
        return BlockSparse(kept, 0.01 * torch.randn(len(kept), *tile, generator=draw), shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def facts(self, dtype: torch.dtype) -> tuple[int, int]:
        """Return its number of values, and its bytes when packed with values of a dtype."""
        values = places = 0
        for name in self:
            delta = self[name]
            values += delta.up.numel() + delta.down.numel() if isinstance(delta, LowRank) else delta.values.numel()
            if isinstance(delta, Sparse):
                places += 2 * len(delta.indices)
            elif isinstance(delta, BlockSparse):
                places += 4 * len(delta.blocks)
        return values, values * dtype.itemsize + places


def with_encoded(kinds: list[str]) -> list[str]:
    """Return kinds of experts, and each of them in few bits."""
    return [*kinds, *(f"{kind}, {ENCODED}" for kind in kinds)]


def experts_of(base: nn.Module, kind: str, count: int) -> list[Any]:
    """Return random experts of a kind, which are stored if it is one in few bits."""
    name, _, encoding = kind.partition(", ")
    experts = [RandomExpert(base, name, number) for number in range(count)]
    if not encoding:
        return experts
    with tempfile.TemporaryDirectory() as folder:  # opened files stay after their names
        for number, expert in enumerate(experts):
            write_expert(Path(folder) / str(number), expert, RECORD, encoding=encoding)
        return [open_expert(Path(folder) / str(number)) for number in range(count)]


def mixtures_of(model: nn.Module) -> list[Mixture]:
    """Return the mixtures in the layers of a model."""
    found = [getattr(layer, "expert", None) for layer in model.modules()]
    return [one for one in found if isinstance(one, Mixture)]


def let_go(model: nn.Module) -> None:
    """Make the mixtures forget what they have decoded, as other experts would."""
    for mixture in mixtures_of(model):
        for delta in mixture.deltas:
            if delta is not None:
                delta.let_go()


def held_bytes(model: nn.Module) -> int:
    """Return the bytes of the deltas in the mixtures of a model."""
    return sum(delta.nbytes for mixture in mixtures_of(model) for delta in mixture.deltas if delta is not None)


def contenders(base: nn.Module, kinds: list[str]) -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """Return models that share the base's weights, and what their forward pass needs to know of the experts."""
    shared = {id(parameter): parameter for parameter in base.parameters()}
    found: dict[str, tuple[nn.Module, dict[str, Any]]] = {"base": (base, {})}
    for kind in with_encoded(kinds):
        model = copy.deepcopy(base, dict(shared))
        routed(model, experts_of(base, kind, ROWS), rows=range(ROWS), check=False)
        found[kind] = (model, {})
    model = copy.deepcopy(base, dict(shared))
    routed(model, [RandomExpert(base, "LoRA", number) for number in range(ROWS)], Arrow(), check=False)
    found["Arrow"] = (model, {})
    mixed = peft_model(copy.deepcopy(base, dict(shared)), ROWS)
    found["PEFT LoRA"] = (mixed, {"adapter_names": [f"expert{number}" for number in range(ROWS)]})
    found["PEFT Arrow"] = (peft_model(copy.deepcopy(base, dict(shared)), ROWS, arrow=True), {})
    return found


def peft_model(base: Any, count: int, arrow: bool = False) -> nn.Module:
    """Return PEFT's model of random LoRAs, which are mixed by row, or by token as its Arrow says."""
    common: dict[str, Any] = {"r": RANK, "lora_alpha": RANK, "lora_dropout": 0.0, "target_modules": PROJECTIONS}
    config = peft.LoraConfig(**common)
    model = peft.get_peft_model(base, config, "expert0", autocast_adapter_dtype=False)
    names = [f"expert{number}" for number in range(count)]
    for name in names[1:]:
        model.add_adapter(name, config)
    draw = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = (0.01 * torch.randn(parameter.shape, generator=draw)).to(next(base.parameters()).dtype)
    if arrow:
        chosen = peft.ArrowConfig(top_k=3)
        chosen.task_adapter_names, chosen.gks_adapter_names = names, []
        model.add_adapter("arrow_router", peft.LoraConfig(**common, arrow_config=chosen))
        model.set_adapter("arrow_router")
    return model.eval()


def passes(model: nn.Module, named: dict[str, Any], work: str, vocabulary: int) -> Callable[[], Tensor]:
    """Return a forward pass; decoding goes on from the same prompt each time."""
    ids = torch.randint(vocabulary, (ROWS, WORKS[work]), generator=torch.Generator().manual_seed(0))
    if work != "decode":

        def prefill() -> Tensor:
            let_go(model)
            return model(input_ids=ids, use_cache=False, logits_to_keep=1, **named).logits

        return prefill
    prompt = torch.randint(vocabulary, (ROWS, PROMPT), generator=torch.Generator().manual_seed(1))
    cache = DynamicCache()
    # The name of this argument changes with transformers 5.24.
    known = inspect.signature(LlamaForCausalLM.forward).parameters
    named = named | {"cache" if "cache" in known else "past_key_values": cache}
    model(input_ids=prompt, logits_to_keep=1, **named)

    def decode() -> Tensor:
        for _ in range(4):
            logits = model(input_ids=ids, **named).logits
            cache.crop(-1)
        return logits

    return decode


@torch.no_grad()
def compare(dtype: torch.dtype, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return for each work the ratios to the base alone, beside the floors and the goals."""
    base: Any = language_model(options.quick).base.to(dtype).eval()
    models = contenders(base, options.kinds)
    linear = sum(layer.weight.numel() for layer in base.modules() if isinstance(layer, nn.Linear))
    rows = []
    for work in WORKS:
        calls = {name: passes(*model, work, base.config.vocab_size) for name, model in models.items()}
        median = medians(calls, options.repeats)
        row: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "work": work}
        row |= {name: median[name] / median["base"] for name in calls}
        for kind in options.kinds:
            values, size = RandomExpert(base, kind, 0).facts(dtype)
            share = ROWS * size / (linear * dtype.itemsize) if work == "decode" else values / linear
            row[f"{kind}, floor"] = 1 + share
            row[f"{kind}, goal"] = 1 + 1.2 * share if work == "decode" else GOALS[kind]
        rows.append(row)
    return rows


def memory(kind: str, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return what 20 experts of a kind take in a process of its own, over their packed bytes."""
    if options.quick:
        return own_memory(kind, getattr(torch, dtype), options)
    return in_own_process(__file__, "--memory", kind, "--dtype", dtype)


@torch.no_grad()
def own_memory(kind: str, dtype: torch.dtype, options: argparse.Namespace) -> dict[str, Any]:
    """Return what many experts of a kind add to this process."""
    many = ROWS if options.quick else MANY
    base: Any = language_model(options.quick).base.to(dtype).eval()
    passes(base, {}, "prefill 128", base.config.vocab_size)()
    before = high_water()
    name = "LoRA" if kind in ARROWS else kind
    packed = many * RandomExpert(base, name.partition(",")[0], 0).facts(dtype)[1]
    size = sum(parameter.nbytes for parameter in base.parameters())
    row: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "kind": kind, "experts": many}
    model = base
    if kind == "PEFT Arrow":
        model = peft_model(base, many, arrow=True)
    else:
        given = {"router": Arrow()} if kind == "Arrow" else {"rows": range(ROWS)}
        routed(base, experts_of(base, name, many), **given, check=False)
        row["held_over_packed"] = held_bytes(base) / packed
        row["with_base"] = 1 + held_bytes(base) / size
    passes(model, {}, "prefill 128", base.config.vocab_size)()
    row |= {"peak_over_packed": (high_water() - before) / packed}
    return row | ({"used_with_base": 1 + held_bytes(base) / size} if "with_base" in row else {})


def main() -> None:
    parser = Parser(__doc__, quick="a tiny model: the numbers mean nothing")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="all if not given")
    parser.add_argument("--repeats", type=int, default=5, help="rounds after a warm-up: 5")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        print(json.dumps(own_memory(options.memory, getattr(torch, options.dtype[0]), options)))
        return
    options.repeats = 1 if options.quick else options.repeats
    pairs = [(kind, dtype) for dtype in options.dtype for kind in [*with_encoded(options.kinds), *ARROWS]]
    space = [memory(kind, dtype, options) for kind, dtype in pairs]
    rows = [row for dtype in options.dtype for row in compare(getattr(torch, dtype), options)]
    output(options, {"kinds": options.kinds, "rows": rows, "memory": space}, show)


def show(report: dict[str, Any]) -> None:
    """Print both tables."""
    print_machine(report)
    kinds = report["kinds"]
    others = [*with_encoded(kinds)[len(kinds) :], "PEFT LoRA", *ARROWS]
    names = [*kinds, *others]
    print(f"CPU time over the base alone (floor; goal)\n\n| | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
    for row in report["rows"]:
        cells = [f"{row[kind]:.2f} ({row[f'{kind}, floor']:.2f}; {row[f'{kind}, goal']:.2f})" for kind in kinds]
        cells += [f"{row[name]:.2f}" for name in others]
        print(f"| {row['dtype']}, {row['work']} | {' | '.join(cells)} |")
    names = ["held_over_packed", "peak_over_packed", "with_base", "used_with_base"]
    print(f"\nBytes of {report['memory'][0]['experts']} experts\n")
    print(f"| | {' | '.join(names).replace('_', ' ')} |\n|{'---|' * (len(names) + 1)}")
    for row in report["memory"]:
        cells = [f"{row[name]:.2f}" if name in row else "" for name in names]
        print(f"| {row['dtype']}, {row['kind']} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
