"""Which merge keeps most of its experts: every method, on experts of every kind, as it comes and tuned.

Twenty experts of each kind (single entries, tiles, LoRA, full) are trained as in the quickstart, on a base of each
seed, and tested alone. All twenty are merged by each method: with its default settings, and with its scale (and
exponent, and what `merge_methods.py` lists) chosen by the loss on validation words. Both are tested on the words of the
twenty tasks and of the held-out ones. What is shown is exact match in %, how much of the single experts' score it is,
and the difference to the reference with a 95 % interval: a bootstrap over the pairs of seed and task, which all methods
share.

    python benchmarks/merge_quality.py [--kinds sparse ...] [--methods TIES ...] [--seeds 0 1 2] [--work DIR] [--json]
    python benchmarks/merge_quality.py --real .cache/smollm2 DATA

The second form trains three experts of each kind on a pretrained base, measures them and their merges in bfloat16 (a
CPU without instructions for it is faster with `--dtype float32`), and held-out tasks by their loss. What is done stays
in `--work`, so a run that was stopped goes on where it was, and a table can be shown again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import torch
from merge_methods import METHODS, REFERENCE
from merge_worlds import Experts, RealExperts, SuiteExperts

from modular_experts.base import DType
from modular_experts.base.apply import applied
from modular_experts.data import TaskMixture
from modular_experts.evaluation import measure
from modular_experts.jobs import JSONLines, LocalProcesses, Piece, print_progress, run
from modular_experts.library import open_expert
from modular_experts.merger.merged import Merged
from modular_experts.statistics import take_statistics
from modular_experts.tuning import Combination, Objective, tune

TUNING_ROWS = 16
"""Validation rows of a task that settings are chosen on."""


def main() -> None:
    options = _options()
    work = Path(options.work)
    worlds = {seed: _world(options, seed) for seed in options.seeds}
    singles = [(seed, kind, task) for seed, w in worlds.items() for kind in options.kinds for task in w.tasks]
    alone = _run(work / "singles.jsonl", worlds, singles, _single, options.processes)
    names = [name for name in METHODS if not options.methods or name in options.methods or name == REFERENCE]
    merges = [(seed, kind, name) for seed in worlds for kind in options.kinds for name in names]
    wanted = {statistics for name in names for statistics in METHODS[name].statistics}
    for seed, kind in dict.fromkeys((seed, kind) for seed, kind, _ in merges):
        _statistics(worlds[seed], kind, wanted)
    merged = _run(work / "merges.jsonl", worlds, merges, _merge, options.processes)
    rows = _rows(alone, merged, options, names)
    held_out = next(iter(worlds.values())).held_out
    if options.json:
        json.dump({"seeds": options.seeds, "held_out": held_out, "rows": rows}, sys.stdout, indent=2)
    else:
        _print(rows, options.seeds, held_out)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = list(Experts.kinds)
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--work", help="directory for bases, experts and results")
    parser.add_argument(
        "--real", nargs=2, metavar=("BASE", "DATA"), help="a pretrained base and a folder of task files"
    )
    parser.add_argument(
        "--dtype", choices=get_args(DType), help="what is measured in: that of the base, or bfloat16 in the second form"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="at once, each on one thread: all cores")
    parser.add_argument("--json", action="store_true", help="print only JSON")
    options = parser.parse_args()
    options.seeds = options.seeds or ([0] if options.real else [0, 1, 2])
    options.dtype = options.dtype or ("bfloat16" if options.real else None)
    options.work = options.work or ("runs/merge-quality-real" if options.real else "runs/merge-quality")
    return options


def _world(options: argparse.Namespace, seed: int) -> Experts:
    if options.real:
        return RealExperts(seed, Path(options.work), options.dtype, *map(Path, options.real))
    return SuiteExperts(seed, Path(options.work), options.dtype)


def _run(
    file: Path, worlds: dict[int, Experts], keys: Sequence[tuple[int, str, str]], work: Callable, processes: int
) -> list[dict[str, Any]]:
    """Do in processes what is not in the file yet, and return all that is there."""
    store = JSONLines(file)
    left = [key for key in keys if key not in store]
    assert all(worlds[seed].base.exists() for seed, _, _ in left)
    with LocalProcesses(processes) as pool:
        run([Piece(key, work, (worlds[key[0]], *key)) for key in keys], store, pool, print_progress()).raise_failures()
    return list(store.values())


def _single(world: Experts, seed: int, kind: str, task: str) -> dict[str, Any]:
    """Train an expert, if it is not there, and test it on its task."""
    logging.getLogger("modular_experts").setLevel(logging.ERROR)
    path = world.expert(kind, task)
    if not path.exists():
        world.train(kind, task)
    scores = _tested(world, [task], open_expert(path), held_out=False)
    return {"piece": [seed, kind, task], "exact": scores[task]}


def _statistics(world: Experts, kind: str, wanted: set[str]) -> None:
    experts = [world.expert(kind, task) for task in world.tasks]
    for statistics in sorted(wanted):
        if not all((path / "statistics" / f"{statistics}.safetensors").exists() for path in experts):
            print(f"taking {statistics} statistics of {kind}", file=sys.stderr, flush=True)
            take_statistics(experts, statistics, world.mixture(world.tasks), base=str(world.base), overwrite=True)  # type: ignore[arg-type]


def _merge(world: Experts, seed: int, kind: str, name: str) -> dict[str, Any]:
    """Merge the experts of a kind, with default settings and with tuned ones, and test both."""
    logging.getLogger("modular_experts").setLevel(logging.ERROR)
    torch.manual_seed(seed)
    experts = [open_expert(world.expert(kind, task)) for task in world.tasks]
    way, started = METHODS[name], time.process_time()
    found: dict[str, Any] = {"piece": [seed, kind, name]}
    data = world.mixture(world.tasks)
    data.eval_limit = TUNING_ROWS
    objective = Objective(world.model, data)
    if way.search:
        merges = [dict(Merged(experts, method)) for method in way.merges]
        with Combination(objective.model, [*merges, *experts], len(merges)) as combination:
            chosen = way.search.search(combination, objective)
            combination.move_to(chosen.coefficients)
            found |= {"loss": chosen.losses, "settings": {}, "tuned": _tested(world, world.tasks, {})}
    else:
        found["plain"] = _tested(world, world.tasks, dict(Merged(experts, way.method)))
        tuned = tune(experts, way.method, objective, grid={**world.grid, **way.grid})
        found |= {"loss": tuned.best.losses, "settings": tuned.best.settings}
        found["tuned"] = _tested(world, world.tasks, dict(Merged(experts, tuned.method)))
    return found | {"seconds": time.process_time() - started}


def _tested(world: Experts, tasks: Sequence[str], vector: Any, held_out: bool = True) -> dict[str, float]:
    """Return the exact match of each task on its test rows, and what is measured on the held-out ones."""
    with applied(world.model, vector, check=False):
        found = _measured(world, world.mixture(tasks), "exact_match")
        if held_out:
            found |= _measured(world, world.mixture([], held_out=True), world.held_out)
    return found


def _measured(world: Experts, data: TaskMixture, score: str) -> dict[str, float]:
    data.setup("test")
    new_tokens = None if score == "loss" else world.new_tokens
    scores = measure(world.model, world.tokenizer, data.test_dataloader(), data.roles, new_tokens)
    return {task: facts[score] for task, facts in scores["tasks"].items()}


def _rows(
    singles: Sequence[dict[str, Any]], merges: Sequence[dict[str, Any]], options: argparse.Namespace, names: list[str]
) -> list[dict[str, Any]]:
    """Return a row for each kind and method: scores, shares of the singles', differences to the reference."""
    alone = {tuple(result["piece"]): result["exact"] for result in singles}
    rows = []
    for kind in options.kinds:
        mine = {
            name: [r for r in merges if r["piece"][1:] == [kind, name] and r["piece"][0] in options.seeds]
            for name in names
        }
        tasks = {task for seed, k, task in alone if k == kind and seed in options.seeds}
        single = fmean(alone[seed, kind, task] for seed in options.seeds for task in tasks)
        reference = _pairs(mine[REFERENCE], "tuned", tasks)[0]
        for name in names:
            row: dict[str, Any] = {"kind": kind, "method": name, "single": single}
            for column in ("plain", "tuned"):
                if all(column in r for r in mine[name]):
                    held_in, held_out = _pairs(mine[name], column, tasks)
                    row |= {column: fmean(held_in.values()), f"{column} held out": fmean(held_out.values())}
            row["kept"] = row["tuned"] / single
            row["difference"] = _interval(held_in, reference)
            row["loss"] = fmean(fmean(r["loss"].values()) for r in mine[name])
            row["settings"] = [r["settings"] for r in mine[name]]
            rows.append(row)
    return rows


def _pairs(results: Sequence[dict[str, Any]], column: str, held_in: set[str]) -> list[dict[tuple[int, str], float]]:
    """Return the score of each pair of seed and task: of the held-in tasks, and of the others."""
    scores = {(r["piece"][0], task): score for r in results for task, score in r[column].items()}
    return [{pair: scores[pair] for pair in scores if (pair[1] in held_in) == wanted} for wanted in (True, False)]


def _interval(mine: dict[tuple[int, str], float], theirs: dict[tuple[int, str], float]) -> list[float]:
    """Return the 95 % interval of the mean difference over pairs of seed and task, by 2,000 bootstrap draws."""
    differences = torch.tensor([mine[pair] - theirs[pair] for pair in sorted(mine)])
    draws = torch.randint(len(differences), (2000, len(differences)), generator=torch.Generator().manual_seed(0))
    means = differences[draws].mean(1)
    return [means.quantile(0.025).item(), means.quantile(0.975).item()]


def _print(rows: Sequence[dict[str, Any]], seeds: Sequence[int], held_out: str) -> None:
    print(f"exact match in %, mean over tasks and seeds {', '.join(map(str, seeds))}; kept: tuned over the single")
    print(f"experts; in brackets the 95 % interval of the difference to tuned {REFERENCE}; best first")
    if held_out == "loss":
        print("held out: loss in nats per token of the answer")
    for kind in dict.fromkeys(row["kind"] for row in rows):
        mine = [row for row in rows if row["kind"] == kind]
        print(f"\n{kind}: the experts alone {100 * mine[0]['single']:.1f}\n")
        print("| method | plain | tuned | | kept | plain, held out | tuned, held out | settings |\n" + "|---" * 8 + "|")
        for row in sorted(mine, key=lambda row: -row["tuned"]):
            print("| " + " | ".join(_cells(row, held_out)) + " |")


def _cells(row: dict[str, Any], held_out: str = "exact_match") -> Iterator[str]:
    factor, digits = (1, 2) if held_out == "loss" else (100, 1)
    low, high = row["difference"]
    yield row["method"]
    yield f"{100 * row['plain']:.1f}" if "plain" in row else ""
    yield f"{100 * row['tuned']:.1f}"
    yield f"[{100 * low:+.1f}, {100 * high:+.1f}]" if row["method"] != REFERENCE else ""
    yield f"{100 * row['kept']:.0f}"
    yield f"{factor * row['plain held out']:.{digits}f}" if "plain" in row else ""
    yield f"{factor * row['tuned held out']:.{digits}f}"
    keys = sorted({key for settings in row["settings"] for key in settings})
    yield "; ".join(f"{key} {', '.join(f'{s[key]:.3g}' for s in row['settings'])}" for key in keys)


if __name__ == "__main__":
    main()
