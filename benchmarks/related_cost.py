"""What a training step of an expert or a mixture of another paper costs beside a step of a LoRA.

Measured on a Llama of 135 million parameters with random weights: training steps of 2 x 128 tokens in turn, in an order
drawn anew for each round, as medians of CPU time, and the peak memory of a process of its own. Experts stand over the
LoRA of rank 8, mixtures over the LoRA that has as many trained numbers as they.

    python benchmarks/related_cost.py [--parts experts mixtures] [--names AdaMix GOAT ...] [--repeats 3] [--work DIR]

What is done stays in `--work`, so a run that was stopped goes on where it was. All of it takes half an hour.
"""

import argparse
import copy
import json
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from contenders import language_model
from measuring import Parser, high_water, in_own_process, medians, output, print_machine, print_table
from torch import Tensor, nn

from modular_experts.base.files import quiet_transformers
from modular_experts.evaluation import batch_losses
from modular_experts.experts import LoRAExpert
from modular_experts.experts.site import Site
from modular_experts.injection import draw_experts, extra_losses, inject, named_experts
from modular_experts.reports.json_lines import JSONLines
from modular_experts.study.piece import Piece
from modular_experts.study.processes import LocalProcesses
from modular_experts.study.run_pieces import run_pieces
from modular_experts.systems.ada_mix import AdaMixExpert
from modular_experts.systems.boosting import BoostedLoRAExpert
from modular_experts.systems.glora import GLoRAExpert
from modular_experts.systems.goat import GOATExpert
from modular_experts.systems.hilo import HiLo
from modular_experts.systems.lora_ir import LoRAIR, TaskGate
from modular_experts.systems.moa import MoA
from modular_experts.systems.molora import MoLoRAExpert
from modular_experts.systems.point_lora import PointLoRA
from modular_experts.systems.recast import TemplateBanks
from modular_experts.systems.tt_lora import TTLoRAExpert

__all__ = ["PLANS", "parameters"]

BOOSTERS = 7
"""How many boosters of rank 1 a weight has after 50 steps in all blocks, in rounds of eight."""


def everywhere(type_: Callable[..., Any], **settings: Any) -> dict[str, Any]:
    """Return the plan that gives all linear layers the same expert."""
    return {"all-linear": partial(type_, **settings)}


def with_boosters(weight: Tensor, site: Site, every: int) -> BoostedLoRAExpert:
    """Make an expert with boosters, in a round that trains one block of `every`."""
    expert = BoostedLoRAExpert(weight, rank=1)
    for _ in range(BOOSTERS):
        with torch.no_grad():
            expert.up.fill_(1e-3)
        expert.boost(torch.Generator().manual_seed(0))
    expert.leave_out((site.depth or 0) % every != every // 2)
    return expert


def tt_lora(attention: int, mlp: int) -> dict[str, Any]:
    """Return the plan of tensor trains of one rank in attention and another in the MLP."""
    return {r".*self_attn.*": partial(TTLoRAExpert, rank=attention), r".*mlp.*": partial(TTLoRAExpert, rank=mlp)}


PLANS: dict[str, dict[str, Callable[[], Any]]] = {
    "experts": {
        "LoRA, rank 8": lambda: everywhere(LoRAExpert, rank=8, alpha=16.0),
        "LoRA, rank 4": lambda: everywhere(LoRAExpert, rank=4, alpha=8.0),
        "LoRA, rank 1": lambda: everywhere(LoRAExpert, rank=1, alpha=2.0),
        "TT-LoRA": lambda: tt_lora(3, 2),
        "AdaMix": lambda: everywhere(AdaMixExpert, rank=4, alpha=8.0, copies=4),
        "AdaMix, nothing shared": lambda: everywhere(AdaMixExpert, rank=4, alpha=8.0, copies=4, share_up=False),
        "XGBLoRA": lambda: {"all-linear": partial(with_boosters, every=3)},
        "XGBLoRA, all blocks": lambda: {"all-linear": partial(with_boosters, every=1)},
        "GLoRA": lambda: everywhere(GLoRAExpert, rank=4),
        "RECAST": TemplateBanks,
    },
    "mixtures": {
        "LoRA": lambda: everywhere(LoRAExpert, rank=18),
        "MoLoRA": lambda: everywhere(MoLoRAExpert, experts=4, rank=4),
        "GOAT": lambda: everywhere(GOATExpert, experts=4, rank=4),
        "HiLo": lambda: HiLo(experts=[2, 4], ranks=[2, 8]),
        "HiLo, fewer": lambda: HiLo(experts=[2, 4], ranks=[1, 6]),
        "MoA": lambda: MoA(rank=18, alpha=16.0, adapter_size=63),
        "LoRA-IR": lambda: LoRAIR(experts=2, rank=9),
        "PointLoRA": lambda: PointLoRA(rank=16, tokens=8, hidden=43),
    },
}
"""The plans of each part by name; the first is the LoRA over which the others stand. "HiLo, fewer" has at least 20 %
fewer trained numbers than MoLoRA, the other mixtures as many as the LoRA."""


def main() -> None:
    parser = Parser(__doc__, quick="one round on a tiny model, to see that it works")
    names = [name for plans in PLANS.values() for name in plans]
    parser.add_argument("--parts", nargs="+", choices=list(PLANS), default=list(PLANS))
    parser.add_argument("--names", nargs="+", choices=names, metavar="NAME", default=names)
    parser.add_argument("--repeats", type=int, default=3, help="rounds of steps after a warm-up: 3")
    parser.add_argument("--work", default="runs/related-cost", help="directory for what is measured")
    parser.add_argument("--own-cost", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.own_cost:
        part, name = options.own_cost
        print(json.dumps(own_memory(part, name, options.quick)))
        return
    found: dict[str, Any] = {}
    for part in options.parts:
        reference, *others = PLANS[part]
        wanted = [reference, *(name for name in others if name in options.names)]
        store = JSONLines(Path(options.work, f"{part}{'-quick' * options.quick}.jsonl"))
        found[part] = costs(store, part, wanted, 1 if options.quick else options.repeats, options.quick)
    output(options, found, show)


def parameters(model: nn.Module) -> dict[str, int]:
    """Return how many numbers are trained, and how many of them one token meets: of k of n experts, k / n."""
    trained = active = 0
    experts: list[Any] = [expert for _, expert in named_experts(model)]
    of_prompt = next((expert.k for expert in experts if isinstance(expert, TaskGate)), None)
    for expert in experts:
        taken = expert.k if isinstance(expert, MoLoRAExpert) else of_prompt
        for name, parameter in expert.named_parameters():
            trained += parameter.numel()
            share = 1 if taken is None or name == "router" else taken / expert.experts
            active += round(share * parameter.numel())
    return {"trained": trained, "active": active}


def costs(store: JSONLines, part: str, names: Sequence[str], repeats: int, small: bool) -> list[Any]:
    """Return for each name the time of a step and the memory of a process, also over the first name's."""
    with LocalProcesses(1) as pool:
        pieces = [Piece(("memory", name), _memory, (part, name, small)) for name in names]
        pieces.append(Piece(("time", *names), _times, (part, names, repeats, small)))
        run_pieces(pieces, store, pool, lambda *now: print(*now, file=sys.stderr)).raise_failures()
    peaks, times = {name: store["memory", name] for name in names}, store["time", *names]
    first = names[0]
    return [
        {"name": name, "time": times[name]["seconds"] / times[first]["seconds"], "memory": peaks[name] / peaks[first]}
        | {"seconds": times[name]["seconds"], "bytes": peaks[name]}
        | {key: times[name][key] / times[first][key] for key in ("trained", "active")}
        for name in names
    ]


def show(report: dict[str, Any]) -> None:
    """Print a table of each part."""
    print_machine(report)
    for part in [part for part in PLANS if part in report]:
        columns = {"trained": "trained", "active": "active", "time": "time of a step", "memory": "peak memory"}
        print_table(part, report[part], columns)


def own_memory(part: str, name: str, small: bool) -> int:
    """Return the peak memory, in bytes, of this process after two training steps."""
    torch.set_num_threads(1)
    step, _ = _step(PLANS[part][name](), small)
    for _ in range(2):
        step()
    return high_water()


def _memory(part: str, name: str, small: bool) -> int:
    if small:
        return own_memory(part, name, small)
    return in_own_process(str(Path(__file__).absolute()), "--own-cost", part, name)


def _times(part: str, names: Sequence[str], repeats: int, small: bool) -> dict[str, dict[str, float]]:
    """Return the median CPU seconds of a step of each name, and its numbers of parameters."""
    torch.set_num_threads(1)
    steps = {name: _step(PLANS[part][name](), small) for name in names}
    seconds = medians({name: step for name, (step, _) in steps.items()}, repeats)
    return {name: {"seconds": seconds[name], **parameters(model)} for name, (_, model) in steps.items()}


@cache
def _base(small: bool) -> nn.Module:
    return language_model(small).base


def _step(plan: Any, small: bool) -> tuple[Callable[[], None], nn.Module]:
    """Return a training step of a plan, as `ExpertModule` makes it, and the model; models share their weights."""
    shared = _base(small)
    base: Any = copy.deepcopy(shared, {id(parameter): parameter for parameter in shared.parameters()})
    size = (2, 32) if small else (2, 128)
    ids = torch.randint(base.config.vocab_size, size, generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : ids.shape[1] // 2] = -100
    batch: Any = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    torch.manual_seed(0)
    inject(base, plan)
    for gate in [expert for _, expert in named_experts(base) if isinstance(expert, TaskGate)]:
        gate.router.learn([], [torch.randn(16, gate.router.weight.shape[1]) for _ in range(gate.experts)])
    base.train()
    optimizer = torch.optim.AdamW([p for p in base.parameters() if p.requires_grad], lr=1e-3, fused=True)
    training = SimpleNamespace(model=base, batch_losses=batch_losses)
    for _, expert in named_experts(base):
        expert.before_fit(training, None)

    def step() -> None:
        draw_experts(base, "0")
        sums, counts, *added = training.batch_losses(base, batch)
        terms = [*extra_losses(base).values(), *(one / counts.sum() for found in added for one in found.values())]
        sum(terms, start=sums.sum() / counts.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, base


if __name__ == "__main__":
    with quiet_transformers():
        main()
