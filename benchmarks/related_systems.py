"""Trained mixtures beside a LoRA: what one model learns of ten tasks, at equal parameters, and what it costs.

Each system is trained once on ten tasks of the generated suite together, at all linear layers, on a base of each seed.
Two sizes of each stand beside one LoRA: as many *trained* numbers as it has, and as many *active* ones, which one token
meets (a mixture of which a token takes half has more in all). Both within 2 %. The learning rate is the one of three
with the lowest loss on validation words of the first seed. Shown are exact match in % and loss on test words of the ten
tasks and of the held-out ones, with 95 % intervals of the difference to the LoRA and to MoLoRA of the same size (a
bootstrap over the pairs of seed and task), and what one LoRA for each task gives.

The cost is that of `related_cost`, over the LoRA of equal trained parameters.

The part `needle` hides the words of the ten tasks in capitals among 60 to 120 letters, for the LoRA and PointLoRA, and
shows in how many prompts all capitals are among the tokens that PointLoRA selects. The part `real` trains systems of
the size of the cost's on six real task files together, 100 steps of 8 rows at a rate of 0.003.

    python benchmarks/related_systems.py [--systems GOAT ...] [--seeds 0 1 2] [--parts quality cost] [--work DIR]
    python benchmarks/related_systems.py --parts needle
    python benchmarks/related_systems.py --parts real --real .cache/smollm2 DATA --systems MoLoRA "HiLo, fewer"

What is done stays in `--work`, so a run that was stopped goes on where it was, and a table can be shown again.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from intervals import interval
from related_cost import costs, own_memory, parameters, print_costs
from related_worlds import FewFiles, HiddenWords, TenTasks, parser_of, run_all
from selection_worlds import make_bases
from step_report import machine
from torch import nn

from modular_experts.base.loading import quiet
from modular_experts.data.batch import prompts
from modular_experts.evaluation import measure
from modular_experts.experts import LoRAExpert
from modular_experts.injection import inject, named_experts
from modular_experts.injection.attach import attached
from modular_experts.jobs import JSONLines
from modular_experts.routing import MoLoRAExpert
from modular_experts.suite.words import LETTERS
from modular_experts.systems.goat import GOATExpert
from modular_experts.systems.hilo import HiLo
from modular_experts.systems.lora_ir import LoRAIR
from modular_experts.systems.moa import MoA
from modular_experts.systems.point_lora import PointLoRA
from modular_experts.systems.point_lora.plan import TokenSelection

QUICK: dict[str, Any] = {"steps": 4, "rates": (1e-3,), "rows": 2}


def everywhere(type_: Callable[..., Any], **settings: Any) -> dict[str, Any]:
    """Return the plan that gives all linear layers the same expert."""
    return {"all-linear": partial(type_, **settings)}


@dataclass(frozen=True)
class System:
    """Makes the plans of a system.

    Attributes:
        trained: On the suite's base, with as many trained numbers as the LoRA.
        active: The same, with as many active ones; None where it would be `trained`.
        large: On the model of 135 million parameters, with as many trained numbers as its LoRA.
        long: As `trained`, where prompts are long.
    """

    trained: Callable[[], Any]
    active: Callable[[], Any] | None
    large: Callable[[], Any]
    long: Callable[[], Any] | None = None


SYSTEMS = {
    "LoRA": System(
        lambda: everywhere(LoRAExpert, rank=10),
        None,
        lambda: everywhere(LoRAExpert, rank=18),
        lambda: everywhere(LoRAExpert, rank=10),
    ),
    "MoLoRA": System(
        lambda: everywhere(MoLoRAExpert, experts=4, rank=2),
        lambda: everywhere(MoLoRAExpert, experts=4, rank=4),
        lambda: everywhere(MoLoRAExpert, experts=4, rank=4),
    ),
    "GOAT": System(
        lambda: everywhere(GOATExpert, experts=4, rank=2),
        lambda: everywhere(GOATExpert, experts=4, rank=4),
        lambda: everywhere(GOATExpert, experts=4, rank=4),
    ),
    "HiLo": System(
        lambda: HiLo(experts=[2, 5], ranks=[1, 3]),
        lambda: HiLo(experts=[3, 6], ranks=[3, 5]),
        lambda: HiLo(experts=[2, 4], ranks=[2, 8]),
    ),
    "HiLo, fewer": System(lambda: HiLo(experts=[2, 5], ranks=[1, 2]), None, lambda: HiLo(experts=[2, 4], ranks=[1, 6])),
    "MoA": System(
        lambda: MoA(rank=10, alpha=16.0, adapter_size=37), None, lambda: MoA(rank=18, alpha=16.0, adapter_size=63)
    ),
    "LoRA-IR": System(
        lambda: LoRAIR(experts=10, rank=1),
        lambda: LoRAIR(experts=10, rank=10),
        lambda: LoRAIR(experts=2, rank=9),
    ),
    "PointLoRA": System(
        lambda: PointLoRA(rank=6, tokens=4, hidden=5),
        None,
        lambda: PointLoRA(rank=16, tokens=8, hidden=43),
        lambda: PointLoRA(rank=6, tokens=8, hidden=5),
    ),
}
"""A LoRA as the reference, and each system; "fewer" has at least 20 % fewer trained numbers than MoLoRA."""

SIZES = ("trained", "active")


def main() -> None:
    options = _options()
    work = Path(options.work)
    report: dict[str, Any] = {"machine": machine(), "quick": options.quick}
    if options.own_cost:
        print(json.dumps(own_memory(_large, options.own_cost, options.quick)))
        return
    if "quality" in options.parts:
        report["quality"] = _quality(work, options)
    if "needle" in options.parts:
        report["needle"] = _needle(work, options)
    if "real" in options.parts:
        report["real"] = _real(work, options)
    if "cost" in options.parts:
        store = JSONLines(work / ("quick-costs.jsonl" if options.quick else "costs.jsonl"))
        report["cost"] = costs(store, __file__, _large, options.systems, options.repeats, options.quick)
    if options.json:
        json.dump(report, sys.stdout, indent=2)
        return
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    for part in ("quality", "needle", "real"):
        if part in report:
            _print_rows(part, report[part])
    if "cost" in report:
        print_costs(report["cost"])


def _options() -> argparse.Namespace:
    parts = ["quality", "cost", "needle", "real"]
    parser = parser_of(__doc__, "systems", SYSTEMS, parts, "runs/related-systems")
    parser.add_argument("--real", nargs=2, metavar=("BASE", "DATA"), help="for that part: a base and its task files")
    options = parser.parse_args()
    if "real" in options.parts and not options.real:
        parser.error("--parts real needs --real BASE DATA, a pretrained base and a folder of task files")
    options.systems = list(dict.fromkeys(["LoRA", *options.systems]))
    if options.quick:
        options.seeds, options.repeats = options.seeds[:1], 1
    return options


def _quality(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    worlds = _worlds(TenTasks, work, options)
    store = _store(work, "systems", options)
    found = _compared(worlds, [(name, size) for name in options.systems for size in SIZES], store, options)
    if not options.quick:
        singles = {("alone", seed, task): world for seed, world in worlds.items() for task in world.tasks}
        run_all(store, _alone, singles, options.processes)
        found["alone"] = fmean(store[key]["exact_match"] for key in singles)
    return found


def _needle(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Compare PointLoRA with the LoRA where prompts are long, and return how often it selects what is sought."""
    worlds, store = _worlds(HiddenWords, work, options), _store(work, "needles", options)
    found = _compared(worlds, [("LoRA", "long"), ("PointLoRA", "long")], store, options)
    rate = found["rows"][-1]["rate"]
    chosen = {("selected", seed, rate): world for seed, world in worlds.items()}
    run_all(store, _selected, chosen, options.processes)
    return found | {"selected": [store[key] for key in chosen]}


def _real(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    base, data = map(Path, options.real)
    worlds = _worlds(FewFiles, work, options, path=base, data=data, dtype="bfloat16")
    return _compared(worlds, [(name, "large") for name in options.systems], _store(work, "real", options), options)


def _worlds(kind: type[TenTasks], work: Path, options: argparse.Namespace, **settings: Any) -> dict[int, TenTasks]:
    worlds = {seed: kind(seed, work, **settings, **(QUICK if options.quick else {})) for seed in options.seeds}
    make_bases(world.base for world in worlds.values())
    return worlds


def _store(work: Path, name: str, options: argparse.Namespace) -> JSONLines:
    return JSONLines(work / f"{'quick-' if options.quick else ''}{name}.jsonl")


def _compared(
    worlds: Mapping[int, TenTasks], sizes: Sequence[tuple[str, str]], store: JSONLines, options: argparse.Namespace
) -> dict[str, Any]:
    """Train systems of some sizes at their best rates, and return their rows of the table; the LoRA comes first."""
    first = next(iter(worlds.values()))
    rows = [(name, size) for name, size in sizes if getattr(SYSTEMS[name], size)]
    tried = {(first.seed, *row, rate): first for row in rows for rate in first.rates}
    run_all(store, _validated, tried, options.processes)
    rates = {row: min(first.rates, key=lambda rate: store[first.seed, *row, rate]["loss"]) for row in rows}
    chosen = {(seed, *row, rates[row]): world for seed, world in worlds.items() for row in rows}
    run_all(store, _validated, chosen, options.processes)
    run_all(store, _tested, {("test", *key): world for key, world in chosen.items()}, options.processes)
    results = {row: [store["test", seed, *row, rates[row]] for seed in worlds] for row in rows}
    found = []
    for name, size in rows:
        mine, reference = results[name, size], results[rows[0]]
        row: dict[str, Any] = {"system": name, "size": size, "rate": rates[name, size]}
        row |= {key: mine[0][key] / reference[0][key] for key in ("trained", "active")}
        for role in dict.fromkeys(facts["role"] for facts in mine[0]["tasks"].values()):
            row[role] = {score: fmean(_pairs(mine, role, score).values()) for score in ("exact_match", "loss")}
            for other in [other for other in ("LoRA", "MoLoRA") if other in dict(rows)]:
                theirs = results[(other, size) if (other, size) in results else rows[0]]
                difference = interval(*(_pairs(one, role, "exact_match") for one in (mine, theirs)))
                row[role][f"over {other}"] = difference
        found.append(row)
    return {"seeds": list(worlds), "rows": found}


def _pairs(results: Sequence[dict[str, Any]], role: str, score: str) -> dict[tuple[int, str], float]:
    """Return a score by pair of seed and task."""
    return {
        (result["seed"], task): facts[score]
        for result in results
        for task, facts in result["tasks"].items()
        if facts["role"] == role
    }


def _expert(world: TenTasks, name: str, size: str, rate: float) -> Path:
    """Return where a trained system is, or will be."""
    return world.expert(f"{name.replace(', ', '-')}-{size}", f"{rate:g}-{world.steps}")


def _validated(world: TenTasks, seed: int, name: str, size: str, rate: float) -> dict[str, float]:
    """Train a system, and return its loss on validation words."""
    path = _expert(world, name, size, rate)
    started = time.process_time()
    if not path.exists():
        world.fit(path, getattr(SYSTEMS[name], size)(), world.tasks, rate, world.steps)
    seconds = time.process_time() - started
    with attached(world.model, path, check=False):
        batches = world.rows_of(world.tasks, "validate").val_dataloader()
        scores = measure(world.model, world.tokenizer, batches, dict.fromkeys(world.tasks, "held_in"), None)
    return {"loss": scores["held_in"]["loss"], "seconds": seconds}


def _tested(world: TenTasks, _: str, seed: int, name: str, size: str, rate: float) -> dict[str, Any]:
    """Return what a trained system scores on the test words of each task, and its numbers of parameters."""
    model, data = world.model, world.rows_of(world.tasks, "test", held_out=True)
    with attached(model, _expert(world, name, size, rate), check=False):
        scores = measure(model, world.tokenizer, data.test_dataloader(), data.roles, world.new_tokens)
    planned = copy.deepcopy(model)
    inject(planned, getattr(SYSTEMS[name], size)())
    return {"seed": seed, "tasks": scores["tasks"], **parameters(planned)}


@torch.no_grad()
def _selected(world: TenTasks, _: str, seed: int, rate: float) -> float:
    """Return of how many test prompts PointLoRA selects every capital, the tokens of the hidden word."""
    capitals = torch.tensor(world.tokenizer.convert_tokens_to_ids(list(LETTERS.upper())))
    with attached(world.model, _expert(world, "PointLoRA", "long", rate), check=False):
        batches = world.rows_of(world.tasks, "test", held_out=True).test_dataloader()
        return fmean(selects(world.model, ids, capitals) for batch in batches for ids in prompts(batch))


def selects(model: nn.Module, ids: torch.Tensor, sought: torch.Tensor) -> bool:
    """Return whether a model with PointLoRA selects all tokens of a prompt `(length,)` that are among the sought."""
    (selection,) = (expert for _, expert in named_experts(model) if isinstance(expert, TokenSelection))
    assert selection.scorer is not None
    scores = selection.scorer(selection.embedding(ids)).flatten()
    best = scores.sort(descending=True, stable=True).indices[: selection.tokens]
    return bool(torch.isin(torch.isin(ids, sought).nonzero(), best).all())


def _alone(world: TenTasks, _: str, seed: int, task: str) -> dict[str, float]:
    """Return what a LoRA of the quickstart that knows one task scores on it."""
    path = world.expert("lora", task)
    if not path.exists():
        world.train("lora", task)
    data = world.mixture([task])
    data.setup("test")
    with attached(world.model, path, check=False):
        scores = measure(world.model, world.tokenizer, data.test_dataloader(), data.roles, world.new_tokens)
    return {"exact_match": scores["tasks"][task]["exact_match"]}


def _large(name: str) -> Any:
    """Return the plan of a system on the model of 135 million parameters."""
    return SYSTEMS[name].large()


def _print_rows(part: str, found: dict[str, Any]) -> None:
    print(
        f"\n{part}: exact match in % / loss in nats per token, means over tasks and seeds {found['seeds']}; in brackets"
    )
    print("the 95 % interval of the difference to the LoRA, and to MoLoRA of the same size; parameters over the LoRA's")
    if "selected" in found:
        shares = ", ".join(f"{100 * share:.1f}" for share in found["selected"])
        print(f"the share of prompts whose selected tokens hold the whole word, by seed, in %: {shares}")
    if "alone" in found:
        print(f"one LoRA for each task: {100 * found['alone']:.1f} held in")
    heading = ["system", "equal", "trained", "active", "rate"]
    roles = [role for role in ("held_in", "held_out") if role in found["rows"][0]]
    heading += [title for role in roles for title in (role.replace("_", " "), "to LoRA", "to MoLoRA")]
    print(f"\n| {' | '.join(heading)} |\n" + "|---" * len(heading) + "|")
    for row in found["rows"]:
        print("| " + " | ".join(_cells(row)) + " |")


def _cells(row: dict[str, Any]) -> Iterator[str]:
    yield row["system"]
    yield row["size"]
    yield f"{row['trained']:.2f}"
    yield f"{row['active']:.2f}"
    yield f"{row['rate']:g}"
    for role in [role for role in ("held_in", "held_out") if role in row]:
        yield f"{100 * row[role]['exact_match']:.1f} / {row[role]['loss']:.3f}"
        for other in ("LoRA", "MoLoRA"):
            low, high = row[role].get(f"over {other}", (0.0, 0.0))
            yield "" if low == high == 0.0 else f"[{100 * low:+.1f}, {100 * high:+.1f}]"


if __name__ == "__main__":
    with quiet():
        main()
