"""Experts of other papers beside LoRAs: what they learn alone, what ten of them keep as one, and what they cost.

Experts of ten tasks of the generated suite are trained apart, 50 steps each, at all linear layers, on a base of each
seed. The learning rate of a kind is the one of three with the lowest loss on validation words of three tasks of the
first seed. Shown are exact match in % and loss on test words: of each expert on
its task, and of the ten merged without data, as the method comes, by the one of four methods with the lowest loss on
validation words of the first seed. In brackets stands the 95 % interval of the difference to the LoRA that the kind is
compared with (a bootstrap over the pairs of seed and task).

The cost is that of `related_cost`, over the LoRA of rank 8; optimizer state is the most that a training held.

    python benchmarks/related_experts.py [--kinds AdaMix ...] [--seeds 0 1 2] [--parts quality cost] [--work DIR]

What is done stays in `--work`, so a run that was stopped goes on where it was, and a table can be shown again. An
expert takes one to two seconds of CPU time, all of it half an hour.
"""

from __future__ import annotations

import argparse
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
from lightning.pytorch import Callback
from related_cost import costs, own_memory, print_costs
from related_worlds import TenTasks, parser_of, run_all
from selection_worlds import make_bases
from step_report import machine
from torch import Tensor
from training_worlds import METHODS

from modular_experts.base.apply import applied
from modular_experts.base.loading import quiet
from modular_experts.callbacks import Boosting, RandomPaths
from modular_experts.evaluation import measure
from modular_experts.experts import (
    BoostedLoRAExpert,
    GLoRAExpert,
    LoRAExpert,
    TemplateBanks,
)
from modular_experts.experts.site import Site
from modular_experts.jobs import JSONLines
from modular_experts.library import open_expert
from modular_experts.merger.merged import Merged
from modular_experts.selection.exchange import optimizer_bytes
from modular_experts.systems.ada_mix import AdaMixExpert
from modular_experts.systems.tt_lora import TTLoRAExpert
from modular_experts.training.learning_rate import LearningRateShape, WarmupRestarts
from modular_experts.tuning import PathSearch, search_paths

STEPS, TUNED = 50, 3
LOW, HIGH = (0.001, 0.003, 0.009), (0.003, 0.009, 0.027)
SCORES = ("exact_match", "loss")


@dataclass(frozen=True)
class Kind:
    """A kind of expert.

    Attributes:
        plan: Its experts, by pattern of layers, or a plan.
        beside: The LoRA that it is compared with.
        rates: Learning rates to choose from.
        callbacks: Makes the callbacks of a training.
        scheduler: Shape of the learning rate, if not that of `ExpertModule`.
        limit: The most numbers that a search of paths keeps of what was trained, on validation words of the task.
        longer: Factor of the number of steps.
    """

    plan: Any
    beside: str
    rates: Sequence[float] = HIGH
    callbacks: Callable[[], Sequence[Callback]] = tuple
    scheduler: LearningRateShape | None = None
    limit: int | None = None
    longer: int = 1


def _lora(rank: int) -> dict[str, Any]:
    return {"all-linear": partial(LoRAExpert, rank=rank, alpha=2.0 * rank)}


def _tt(attention: int, mlp: int) -> dict[str, Any]:
    return {r".*self_attn.*": partial(TTLoRAExpert, rank=attention), r".*mlp.*": partial(TTLoRAExpert, rank=mlp)}


def _ada_mix(**settings: Any) -> dict[str, Any]:
    return {"all-linear": partial(AdaMixExpert, rank=4, alpha=8.0, copies=4, **settings)}


def _boosted(rank: int) -> dict[str, Any]:
    return {"all-linear": partial(BoostedLoRAExpert, rank=rank, alpha=2.0 * rank)}


def _glora() -> dict[str, Any]:
    return {"all-linear": partial(GLoRAExpert, rank=4)}


KINDS = {
    "LoRA, rank 8": Kind(_lora(8), "LoRA, rank 8"),
    "LoRA, rank 4": Kind(_lora(4), "LoRA, rank 4"),
    "LoRA, rank 1": Kind(_lora(1), "LoRA, rank 1"),
    "TT-LoRA": Kind(_tt(3, 2), "LoRA, rank 4", (0.005, 0.015, 0.045)),
    "TT-LoRA, as LoRA 1": Kind(_tt(4, 3), "LoRA, rank 1", (0.005, 0.015, 0.045)),
    "AdaMix": Kind(_ada_mix(), "LoRA, rank 4"),
    "AdaMix, one pass": Kind(_ada_mix(consistency=0.0), "LoRA, rank 4"),
    "AdaMix, weight 100": Kind(_ada_mix(consistency=100.0), "LoRA, rank 4", LOW),
    "AdaMix, nothing shared": Kind(_ada_mix(share_up=False), "LoRA, rank 4"),
    "XGBLoRA": Kind(_boosted(1), "LoRA, rank 1", callbacks=lambda: [Boosting(8)]),
    "XGBLoRA, all blocks": Kind(_boosted(1), "LoRA, rank 1", callbacks=lambda: [Boosting(8, share=1.0)]),
    "ReLoRA": Kind(
        _boosted(4),
        "LoRA, rank 4",
        callbacks=lambda: [Boosting(25, share=1.0)],
        scheduler=WarmupRestarts(every=25, rise=3),
    ),
    "GLoRA": Kind(_glora(), "LoRA, rank 8"),
    "GLoRA, random paths": Kind(_glora(), "LoRA, rank 8", callbacks=lambda: [RandomPaths()]),
    "GLoRA, searched": Kind(_glora(), "LoRA, rank 4", callbacks=lambda: [RandomPaths()], limit=15_360),
    "GLoRA, searched, 400 steps": Kind(
        _glora(), "LoRA, rank 4", callbacks=lambda: [RandomPaths()], limit=15_360, longer=8
    ),
    "RECAST": Kind(TemplateBanks(), "LoRA, rank 4", (0.03, 0.09, 0.27)),
}
"""LoRAs as references, and each kind; the second TT-LoRA trains as many numbers as the LoRA of rank 1. GLoRA has its
largest path, trained alone or on random paths; the others keep at most as many numbers as the LoRA of rank 4."""

BOOSTERS = 7
"""How many boosters of rank 1 a weight has when the cost of XGBLoRA is measured: those of 50 steps in all blocks."""


def main() -> None:
    options = _options()
    work = Path(options.work)
    report: dict[str, Any] = {"machine": machine(), "quick": options.quick}
    if options.own_cost:
        print(json.dumps(own_memory(_plan, options.own_cost, options.quick)))
        return
    if "quality" in options.parts:
        report["quality"] = _quality(work, options)
    if "cost" in options.parts:
        store = JSONLines(work / ("quick-costs.jsonl" if options.quick else "expert-costs.jsonl"))
        report["cost"] = costs(store, __file__, _plan, options.kinds, options.repeats, options.quick)
    if options.json:
        json.dump(report, sys.stdout, indent=2)
        return
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    if "quality" in report:
        _print(report["quality"], options.seeds)
    if "cost" in report:
        print_costs(report["cost"])


def _options() -> argparse.Namespace:
    parser = parser_of(__doc__, "kinds", KINDS, ["quality", "cost"], "runs/related-experts")
    options = parser.parse_args()
    # The LoRA of rank 8 is the first, over which costs are shown.
    first = ["LoRA, rank 8"] if "cost" in options.parts else []
    beside = [KINDS[name].beside for name in options.kinds]
    options.kinds = list(dict.fromkeys([*first, *beside, *options.kinds]))
    if options.quick:
        options.seeds, options.repeats = options.seeds[:1], 1
    return options


@dataclass(frozen=True)
class Apart(TenTasks):
    """Ten tasks of the suite, an expert for each.

    Attributes:
        count: How many of the tasks to take; all if None.
        methods: The merges.
        evaluations: Candidates of a search of paths.
    """

    steps: int = STEPS
    count: int | None = None
    methods: Sequence[str] = tuple(METHODS)
    evaluations: int = 500

    @property
    def tasks(self) -> list[str]:
        return super().tasks[: self.count]

    def path(self, kind: str, task: str, rate: float) -> Path:
        """Return where an expert is, or will be."""
        return self.expert(kind.replace(", ", "-").replace(" ", "-"), f"{task}-{rate:.3g}-{self.steps}")


def _quality(work: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    small = {"steps": 4, "rows": 2, "count": 2, "methods": ("IsoC",), "evaluations": 3} if options.quick else {}
    worlds = {seed: Apart(seed, work, **small) for seed in options.seeds}  # type: ignore[arg-type]
    make_bases(world.base for world in worlds.values())
    store = JSONLines(work / ("quick.jsonl" if options.quick else "experts.jsonl"))
    first = worlds[options.seeds[0]]
    tried = {name: KINDS[name].rates[: 1 if options.quick else None] for name in options.kinds}
    tuned = [(name, task, rate) for name in options.kinds for task in first.tasks[:TUNED] for rate in tried[name]]
    run_all(store, _alone, {("alone", first.seed, *key): first for key in tuned}, options.processes)

    def loss(name: str, rate: float) -> float:
        return fmean(store["alone", first.seed, name, task, rate]["validation"] for task in first.tasks[:TUNED])

    rates = {name: min(tried[name], key=partial(loss, name)) for name in options.kinds}
    for seed, world in worlds.items():
        keys: list[Any] = [("alone", seed, name, task, rates[name]) for name in options.kinds for task in world.tasks]
        run_all(store, _alone, dict.fromkeys(keys, world), options.processes)
        run_all(store, _base, {("base", seed): world}, options.processes)
        keys = [("merged", seed, name, rates[name], way) for name in options.kinds for way in world.methods]
        run_all(store, _merged, dict.fromkeys(keys, world), options.processes)
    return list(_rows(store, worlds, rates, options.kinds))


def _alone(world: Apart, _: str, seed: int, name: str, task: str, rate: float) -> dict[str, Any]:
    """Train an expert, if it is not there, and test it on its task."""
    kind, path, state = KINDS[name], world.path(name, task, rate), OptimizerState()
    started = time.process_time()
    whole = path if kind.limit is None else path.with_name(f"{path.name}-whole")
    if not whole.exists():
        steps = kind.longer * world.steps
        world.fit(whole, kind.plan, [task], rate, steps, state, *kind.callbacks(), scheduler=kind.scheduler)
    if not path.exists():
        algorithm = PathSearch(evaluations=world.evaluations, limit=kind.limit)
        search_paths(whole, algorithm, world.mixture([task]), path, world.rows or 64, str(world.base))
    found = {"seconds": time.process_time() - started, "optimizer_bytes": state.bytes}
    found |= {"trained": state.trained, "validation": _scores(world, [task], open_expert(path), "validate")["loss"]}
    return found | _scores(world, [task], open_expert(path), "test")


def _merged(world: Apart, _: str, seed: int, name: str, rate: float, way: str) -> dict[str, Any]:
    """Merge the experts of all tasks as a method comes, and test the merge."""
    torch.manual_seed(seed)
    deltas = dict(Merged([world.path(name, task, rate) for task in world.tasks], METHODS[way]))
    found = {"validation": _scores(world, world.tasks, deltas, "validate")["loss"]}
    return found | _scores(world, world.tasks, deltas, "test", held_out=True)


def _base(world: Apart, _: str, seed: int) -> dict[str, Any]:
    """Test the base."""
    return _scores(world, world.tasks, {}, "test", held_out=True)


class OptimizerState(Callback):
    """Notes how many numbers are trained, and the most bytes that the optimizer held, without its step counters."""

    bytes = trained = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.trained = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.bytes = max(self.bytes, optimizer_bytes(trainer.optimizers))


def _scores(world: Apart, tasks: Sequence[str], deltas: Any, stage: str, held_out: bool = False) -> dict[str, Any]:
    """Return the mean loss of some tasks on validation words; or exact match and loss of each on test words."""
    data = world.rows_of(tasks, stage, held_out)
    validates = stage == "validate"
    batches = data.val_dataloader() if validates else data.test_dataloader()
    with applied(world.model, deltas, check=False):
        found = measure(world.model, world.tokenizer, batches, data.roles, None if validates else world.new_tokens)
    if validates:
        return {"loss": found["held_in"]["loss"]}
    return {score: {task: facts[score] for task, facts in found["tasks"].items()} for score in SCORES}


def _rows(
    store: JSONLines, worlds: Mapping[int, Apart], rates: Mapping[str, float], names: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield a row for the base and for each kind: scores, differences to its LoRA, and what was trained and held."""
    first = next(iter(worlds.values()))
    bases = {seed: store["base", seed] for seed in worlds}
    yield {"kind": "the base", **_means("alone", bases, first.tasks), **_means("merged", bases, first.tasks)}

    def best(name: str) -> str:
        return min(first.methods, key=lambda way: store["merged", first.seed, name, rates[name], way]["validation"])

    def results(name: str) -> tuple[list[dict[str, Any]], dict[tuple[int, str], Any], dict[int, Any]]:
        keys = {(s, task): ("alone", s, name, task, rates[name]) for s, world in worlds.items() for task in world.tasks}
        alone = {pair: store[key] for pair, key in keys.items()}
        return list(alone.values()), alone, {s: store["merged", s, name, rates[name], best(name)] for s in worlds}

    for name in names:
        found, alone, merged = results(name)
        _, alone_beside, merged_beside = results(KINDS[name].beside)
        row: dict[str, Any] = {"kind": name, "beside": KINDS[name].beside, "rate": rates[name], "method": best(name)}
        row |= {key: max(one[key] for one in found) for key in ("trained", "optimizer_bytes")}
        row |= {"seconds": fmean(one["seconds"] for one in found)}
        # Of an expert only its own task was tested.
        by_seed: list[Any] = [
            {
                s: {score: {t: one[score][t] for (seed, t), one in of.items() if seed == s} for score in SCORES}
                for s in worlds
            }
            for of in (alone, alone_beside)
        ]
        row |= _means("alone", by_seed[0], first.tasks) | _means("merged", merged, first.tasks)
        for column, mine, theirs in (("alone", *by_seed), ("merged", merged, merged_beside)):
            row[f"{column} difference"] = interval(*(_pairs(one, "exact_match", first.tasks) for one in (mine, theirs)))
        yield row


def _pairs(results: Mapping[int, Any], score: str, tasks: Sequence[str], held_in: bool = True) -> dict[Any, float]:
    """Return a score by pair of seed and task, of the tasks or of the others."""
    pairs = {(seed, task): value for seed, result in results.items() for task, value in result[score].items()}
    return {pair: value for pair, value in pairs.items() if (pair[1] in tasks) == held_in}


def _means(column: str, results: Mapping[int, Any], tasks: Sequence[str]) -> dict[str, Any]:
    """Return the mean scores of the tasks, and of the held-out ones if they were tested."""
    found = {column: {score: fmean(_pairs(results, score, tasks).values()) for score in SCORES}}
    if _pairs(results, "loss", tasks, held_in=False):
        found[f"{column} held out"] = {score: fmean(_pairs(results, score, tasks, False).values()) for score in SCORES}
    return found


def _plan(name: str) -> Any:
    """Return the plan by which the cost of a kind is measured."""
    if not name.startswith("XGBLoRA"):
        return KINDS[name].plan
    return {"all-linear": partial(_with_boosters, every=1 if "all blocks" in name else 3)}


def _with_boosters(weight: Tensor, site: Site, every: int) -> BoostedLoRAExpert:
    """Make an expert with boosters, in a round that trains one block of `every`."""
    expert = BoostedLoRAExpert(weight, rank=1)
    for _ in range(BOOSTERS):
        with torch.no_grad():
            expert.up.fill_(1e-3)
        expert.boost(torch.Generator().manual_seed(0))
    expert.leave_out((site.depth or 0) % every != every // 2)
    return expert


def _print(rows: Sequence[dict[str, Any]], seeds: Sequence[int]) -> None:
    print(f"\nexact match in % / loss in nats per token, means over tasks and seeds {seeds}; in brackets the 95 %")
    print("interval of the difference to the LoRA beside it; trained numbers, and bytes of optimizer state")
    heading = ["kind", "trained", "optimizer", "rate", "alone", "beside", "", "method", "merged", "", "held out"]
    print(f"\n| {' | '.join(heading)} |\n" + "|---" * len(heading) + "|")
    for row in rows:
        print("| " + " | ".join(_cells(row)) + " |")


def _cells(row: dict[str, Any]) -> Iterator[str]:
    yield row["kind"]
    yield from (f"{row[key]:,}" if key in row else "" for key in ("trained", "optimizer_bytes"))
    yield f"{row['rate']:.2g}" if "rate" in row else ""
    yield _both(row["alone"])
    yield row.get("beside", "")
    yield _difference(row, "alone")
    yield row.get("method", "")
    yield _both(row["merged"])
    yield _difference(row, "merged")
    yield _both(row["merged held out"])


def _both(scores: Mapping[str, float]) -> str:
    return f"{100 * scores['exact_match']:.1f} / {scores['loss']:.3f}"


def _difference(row: Mapping[str, Any], column: str) -> str:
    if row.get("beside", row["kind"]) == row["kind"]:
        return ""
    return "[{:+.1f}, {:+.1f}]".format(*(100 * bound for bound in row[f"{column} difference"]))


if __name__ == "__main__":
    with quiet():
        main()
