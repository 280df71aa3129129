"""Trained mixtures beside a LoRA: what one model learns of ten tasks, at equal parameters, and what it costs.

Each system is trained once on ten tasks of the generated suite together, at all linear layers, on a base of each seed.
Two sizes of each stand beside one LoRA: as many *trained* numbers as it has, and as many *active* ones, which one token
meets (a mixture of which a token takes half has more in all). Both within 2 %. The learning rate is the one of three
with the lowest loss on validation words of the first seed. Shown are exact match in % and loss on test words of the ten
tasks and of the held-out ones, with 95 % intervals of the difference to the LoRA and to MoLoRA of the same size (a
bootstrap over the pairs of seed and task), and what one LoRA for each task gives.

The cost is that of `related_cost`, over the LoRA of equal trained parameters.

    python benchmarks/related_systems.py [--systems GOAT ...] [--seeds 0 1 2] [--parts quality cost] [--work DIR]

What is done stays in `--work`, so a run that was stopped goes on where it was, and a table can be shown again.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from intervals import interval
from merge_worlds import Experts
from related_cost import costs, own_memory, parameters, print_costs
from selection_worlds import Generated
from step_report import machine

from modular_experts.base.loading import quiet
from modular_experts.data import TaskMixture
from modular_experts.evaluation import measure
from modular_experts.experts import LoRAExpert
from modular_experts.injection import inject
from modular_experts.injection.attach import attached
from modular_experts.jobs import JSONLines, LocalProcesses, Piece, print_progress, run
from modular_experts.routing import GOATExpert, HiLo, LoRAIR, MoA, MoLoRAExpert, PointLoRA

RATES = (1e-3, 3e-3, 1e-2)
STEPS = 200


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
    """

    trained: Callable[[], Any]
    active: Callable[[], Any] | None
    large: Callable[[], Any]


SYSTEMS = {
    "LoRA": System(lambda: everywhere(LoRAExpert, rank=10), None, lambda: everywhere(LoRAExpert, rank=18)),
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
        lambda: PointLoRA(rank=6, tokens=4, hidden=5), None, lambda: PointLoRA(rank=16, tokens=8, hidden=43)
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
    if "cost" in options.parts:
        store = JSONLines(work / ("quick-costs.jsonl" if options.quick else "costs.jsonl"))
        report["cost"] = costs(store, __file__, _large, options.systems, options.repeats, options.quick)
    if options.json:
        json.dump(report, sys.stdout, indent=2)
        return
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    if "quality" in report:
        _print_quality(report["quality"])
    if "cost" in report:
        print_costs(report["cost"])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, metavar="NAME", default=list(SYSTEMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--parts", nargs="+", choices=["quality", "cost"], default=["quality", "cost"])
    parser.add_argument("--work", default="runs/related-systems", help="directory for bases, experts and results")
    parser.add_argument("--processes", type=int, default=1, help="at once, each on one thread: 1")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of steps after a warm-up: 3")
    parser.add_argument("--quick", action="store_true", help="one seed, few steps, small models, to see that it works")
    parser.add_argument("--json", action="store_true", help="print only JSON")
    parser.add_argument("--own-cost", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.systems = list(dict.fromkeys(["LoRA", *options.systems]))
    if options.quick:
        options.seeds, options.repeats = options.seeds[:1], 1
    return options


@dataclass(frozen=True)
class TenTasks(Experts):
    """Ten tasks of the suite in one mixture.

    Attributes:
        steps: Optimizer steps of each system.
        rates: Learning rates to choose from.
        rows: Test and validation rows of a task; all if None.
    """

    steps: int = STEPS
    rates: Sequence[float] = RATES
    rows: int | None = None

    @property
    def world(self) -> Any:
        return Generated(self.seed, self.work)


def _worlds(work: Path, options: argparse.Namespace) -> dict[int, TenTasks]:
    small = {"steps": 4, "rates": RATES[:1], "rows": 2} if options.quick else {}
    return {seed: TenTasks(seed, work, **small) for seed in options.seeds}  # type: ignore[arg-type]


def _quality(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    worlds = _worlds(work, options)
    first = worlds[options.seeds[0]]
    assert all(world.base.exists() for world in worlds.values())
    store = JSONLines(work / ("quick.jsonl" if options.quick else "systems.jsonl"))
    rows = [(name, size) for name in options.systems for size in SIZES if getattr(SYSTEMS[name], size)]
    tried = {(first.seed, name, size, rate): first for name, size in rows for rate in first.rates}
    run_all(store, _validated, tried, options.processes)
    rates = {row: min(first.rates, key=lambda rate: store[first.seed, *row, rate]["loss"]) for row in rows}
    chosen = {(seed, *row, rates[row]): world for seed, world in worlds.items() for row in rows}
    run_all(store, _validated, chosen, options.processes)
    tested = {("test", *key): world for key, world in chosen.items()}
    singles = {("alone", seed, task): world for seed, world in worlds.items() for task in world.tasks}
    run_all(store, _tested, tested, options.processes)
    run_all(store, _alone, {} if options.quick else singles, options.processes)
    found: dict[str, Any] = {"seeds": options.seeds, "rows": []}
    if not options.quick:
        found["alone"] = fmean(store[key]["exact_match"] for key in singles)
    results = {row: [store["test", seed, *row, rates[row]] for seed in worlds] for row in rows}
    for name, size in rows:
        mine = results[name, size]
        row: dict[str, Any] = {"system": name, "size": size, "rate": rates[name, size]}
        row |= {key: mine[0][key] / results["LoRA", "trained"][0][key] for key in ("trained", "active")}
        for role in ("held_in", "held_out"):
            row[role] = {score: fmean(_pairs(mine, role, score).values()) for score in ("exact_match", "loss")}
            for other in [other for other in ("LoRA", "MoLoRA") if other in options.systems]:
                theirs = results[other, size if other != "LoRA" and (other, size) in results else "trained"]
                difference = interval(*(_pairs(one, role, "exact_match") for one in (mine, theirs)))
                row[role][f"over {other}"] = difference
        found["rows"].append(row)
    return found


def run_all(store: JSONLines, work: Callable[..., Any], keys: Mapping[Any, TenTasks], processes: int) -> None:
    with LocalProcesses(processes) as pool:
        pieces = [Piece(key, work, (world, *key)) for key, world in keys.items()]
        run(pieces, store, pool, print_progress()).raise_failures()


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


def _data(world: TenTasks, stage: str) -> TaskMixture:
    data = world.mixture(world.tasks, held_out=stage == "test")
    data.eval_limit = world.rows
    data.setup(stage)
    return data


def _validated(world: TenTasks, seed: int, name: str, size: str, rate: float) -> dict[str, float]:
    """Train a system, and return its loss on validation words."""
    quiet_logs()
    path = _expert(world, name, size, rate)
    started = time.process_time()
    if not path.exists():
        world.fit(path, getattr(SYSTEMS[name], size)(), world.tasks, rate, world.steps)
    seconds = time.process_time() - started
    with attached(world.model, path, check=False):
        batches = _data(world, "validate").val_dataloader()
        scores = measure(world.model, world.tokenizer, batches, dict.fromkeys(world.tasks, "held_in"), None)
    return {"loss": scores["held_in"]["loss"], "seconds": seconds}


def _tested(world: TenTasks, _: str, seed: int, name: str, size: str, rate: float) -> dict[str, Any]:
    """Return what a trained system scores on the test words of each task, and its numbers of parameters."""
    quiet_logs()
    model, data = world.model, _data(world, "test")
    with attached(model, _expert(world, name, size, rate), check=False):
        scores = measure(model, world.tokenizer, data.test_dataloader(), data.roles, world.new_tokens)
    planned = copy.deepcopy(model)
    inject(planned, getattr(SYSTEMS[name], size)())
    return {"seed": seed, "tasks": scores["tasks"], **parameters(planned)}


def _alone(world: TenTasks, _: str, seed: int, task: str) -> dict[str, float]:
    """Return what a LoRA of the quickstart that knows one task scores on it."""
    quiet_logs()
    path = world.expert("lora", task)
    if not path.exists():
        world.train("lora", task)
    data = world.mixture([task])
    data.setup("test")
    with attached(world.model, path, check=False):
        scores = measure(world.model, world.tokenizer, data.test_dataloader(), data.roles, world.new_tokens)
    return {"exact_match": scores["tasks"][task]["exact_match"]}


def quiet_logs() -> None:
    for name in ("modular_experts", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _large(name: str) -> Any:
    """Return the plan of a system on the model of 135 million parameters."""
    return SYSTEMS[name].large()


def _print_quality(found: dict[str, Any]) -> None:
    print(f"\nexact match in % / loss in nats per token, means over tasks and seeds {found['seeds']}; in brackets the")
    print("95 % interval of the difference to the LoRA, and to MoLoRA of the same size; parameters over the LoRA's")
    if "alone" in found:
        print(f"one LoRA for each task: {100 * found['alone']:.1f} held in")
    heading = ["system", "equal", "trained", "active", "rate"]
    heading += [title for role in ("held in", "held out") for title in (role, "to LoRA", "to MoLoRA")]
    print(f"\n| {' | '.join(heading)} |\n" + "|---" * len(heading) + "|")
    for row in found["rows"]:
        print("| " + " | ".join(_cells(row)) + " |")


def _cells(row: dict[str, Any]) -> Iterator[str]:
    yield row["system"]
    yield row["size"]
    yield f"{row['trained']:.2f}"
    yield f"{row['active']:.2f}"
    yield f"{row['rate']:g}"
    for role in ("held_in", "held_out"):
        yield f"{100 * row[role]['exact_match']:.1f} / {row[role]['loss']:.3f}"
        for other in ("LoRA", "MoLoRA"):
            low, high = row[role].get(f"over {other}", (0.0, 0.0))
            yield "" if low == high == 0.0 else f"[{100 * low:+.1f}, {100 * high:+.1f}]"


if __name__ == "__main__":
    with quiet():
        main()
