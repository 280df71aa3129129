"""Which merge keeps most of its experts: every method, on experts of every kind, as it comes and tuned.

Twenty experts of each kind (single entries, tiles, LoRA, full) are trained as in the quickstart, on a base of each
seed, and tested alone. All twenty are merged by each method: with its default settings, and with its scale (and
exponent, and what `merge_methods.py` lists) chosen by the loss on validation words. Both are tested on the words of the
twenty tasks and of the held-out ones. What is shown is exact match in %, how much of the single experts' score it is,
the difference to the reference with a 95 % interval (a bootstrap over the pairs of seed and task, which all methods
share), and on held-out tasks exact match and loss, with a mark where the base's loss is lower.

    python benchmarks/merge_quality.py [--kinds sparse ...] [--methods TIES ...] [--seeds 0 1 2] [--work DIR] [--json]
    python benchmarks/merge_quality.py --real .cache/smollm2 DATA [--tasks 4]

The second form trains fifteen experts of each kind on real tasks and a pretrained base, in bfloat16 with trained values
in float32, and chooses only scales; a CPU without instructions for bfloat16 is faster with `--dtype float32`. `--tasks`
takes the first few of them. What is done stays in `--work`, so a run that was stopped goes on where it was, and a table
can be shown again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import torch
from intervals import interval
from merge_methods import METHODS, REFERENCE, Way
from merge_worlds import Experts, RealExperts, SuiteExperts
from selection_worlds import make_bases

from modular_experts.base import DType
from modular_experts.base.apply import applied
from modular_experts.evaluation import measure
from modular_experts.jobs import JSONLines, LocalProcesses, Piece, print_progress, run
from modular_experts.library import open_expert
from modular_experts.merger.merged import Merged, write_merged
from modular_experts.methods import MergeMethod
from modular_experts.statistics import take_statistics
from modular_experts.tuning import Combination, Objective, tune

TUNING_ROWS = 16
"""Validation rows of a task that settings are chosen on."""


def main() -> None:
    options = _options()
    work = Path(options.work)
    worlds = {seed: _world(options, seed) for seed in options.seeds}
    of_base = _run(work / f"base{options.some}.jsonl", worlds, [(seed, "", "") for seed in worlds], _base, 1)
    singles = [(seed, kind, task) for seed, w in worlds.items() for kind in options.kinds for task in w.tasks]
    alone = _run(work / "singles.jsonl", worlds, singles, _single, options.processes)
    names = [name for name in METHODS if not options.methods or name in options.methods or name == REFERENCE]
    merges = [(seed, kind, name) for seed in worlds for kind in options.kinds for name in names]
    wanted = {statistics for name in names for statistics in METHODS[name].statistics}
    for seed, kind in dict.fromkeys((seed, kind) for seed, kind, _ in merges):
        _statistics(worlds[seed], kind, wanted)
    results = work / f"merges{options.some}.jsonl"
    done = JSONLines(results)
    for seed, kind, name in merges:
        if (seed, kind, name) not in done:
            _write_starts(worlds[seed], kind, METHODS[name])
    merged = _run(results, worlds, merges, _merge, options.processes)
    rows = _rows(of_base, alone, merged, options.kinds, names)
    if options.json:
        json.dump({"seeds": options.seeds, "rows": rows}, sys.stdout, indent=2)
    else:
        _print(rows, options.seeds)


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
    parser.add_argument("--tasks", type=int, help="take the first few tasks of the second form, for a quick turn")
    parser.add_argument(
        "--dtype", choices=get_args(DType), help="what is measured in: that of the base, or bfloat16 in the second form"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="at once, each on one thread: all cores")
    parser.add_argument("--json", action="store_true", help="print only JSON")
    options = parser.parse_args()
    options.seeds = options.seeds or ([0] if options.real else [0, 1, 2])
    options.dtype = options.dtype or ("bfloat16" if options.real else None)
    options.some = f"-{options.tasks}" if options.tasks else ""
    options.work = options.work or ("runs/merge-quality-real" if options.real else "runs/merge-quality")
    return options


def _world(options: argparse.Namespace, seed: int) -> Experts:
    if options.real:
        path, data = map(Path, options.real)
        return RealExperts(seed, Path(options.work), options.dtype, path=path, data=data, count=options.tasks)
    return SuiteExperts(seed, Path(options.work), options.dtype)


def _run(
    file: Path, worlds: dict[int, Experts], keys: Sequence[tuple[int, str, str]], work: Callable, processes: int
) -> list[dict[str, Any]]:
    """Do in processes what is not in the file yet, and return the results of all keys."""
    store = JSONLines(file)
    left = [key for key in keys if key not in store]
    make_bases(worlds[seed].base for seed, _, _ in left)
    with LocalProcesses(processes) as pool:
        run([Piece(key, work, (worlds[key[0]], *key)) for key in keys], store, pool, print_progress()).raise_failures()
    return [store[key] for key in keys]


def _base(world: Experts, seed: int, kind: str, task: str) -> dict[str, Any]:
    """Test the base on all tasks."""
    return {"piece": [seed, kind, task], "tested": _tested(world, world.tasks, {})}


def _single(world: Experts, seed: int, kind: str, task: str) -> dict[str, Any]:
    """Train an expert, if it is not there, and test it on its task."""
    logging.getLogger("modular_experts").setLevel(logging.ERROR)
    path = world.expert(kind, task)
    if not path.exists():
        world.train(kind, task)
    return {"piece": [seed, kind, task], "tested": _tested(world, [task], open_expert(path), held_out=False)}


def _statistics(world: Experts, kind: str, wanted: set[str]) -> None:
    experts = [world.expert(kind, task) for task in world.tasks]
    for statistics in sorted(wanted):
        if not all((path / "statistics" / f"{statistics}.safetensors").exists() for path in experts):
            print(f"taking {statistics} statistics of {kind}", file=sys.stderr, flush=True)
            # Gram matrices need inputs alone; what follows them is what the expert itself writes.
            labels = "rows" if statistics == "fisher" else "experts"
            how = {"base": str(world.base), "labels": labels, "max_new_tokens": world.new_tokens, "overwrite": True}
            take_statistics(experts, statistics, world.mixture(world.tasks), **how)  # type: ignore[arg-type]


def _merge(world: Experts, seed: int, kind: str, name: str) -> dict[str, Any]:
    """Merge the experts of a kind, with default settings and with tuned ones, and test both."""
    logging.getLogger("modular_experts").setLevel(logging.ERROR)
    torch.manual_seed(seed)
    experts = [open_expert(world.expert(kind, task)) for task in world.tasks]
    way, started = METHODS[name], time.process_time()
    found: dict[str, Any] = {"piece": [seed, kind, name]}
    data = world.training_rows(world.tasks) if way.training_rows else world.mixture(world.tasks)
    data.eval_limit = TUNING_ROWS
    if way.search:
        data.eval_limit, data.eval_batch_size = way.training_rows or world.searched
    own = dict(zip(world.tasks, experts, strict=True))
    objective = Objective(world.model, data, own if way.labels == "experts" else None, world.new_tokens)
    found |= {"agreement": objective.agreement} if objective.agreement else {}
    if way.search:
        if way.search.distills:
            objective.remember(own)
        merges = [open_expert(_start(world, kind, method)) for method in way.merges]
        with Combination(objective.model, [*merges, *experts], len(merges)) as combination:
            chosen = way.search.search(combination, objective)
            combination.move_to(chosen.coefficients)
            found |= {"loss": chosen.losses, "settings": {}, "tuned": _tested(world, world.tasks, {})}
    elif world.scales:
        found |= _scaled(world, experts, way.method, objective)
    else:
        found["plain"] = _tested(world, world.tasks, dict(Merged(experts, way.method)))
        tuned = tune(experts, way.method, objective, grid=way.grid)
        found |= {"loss": tuned.best.losses, "settings": tuned.best.settings}
        found["tuned"] = _tested(world, world.tasks, dict(Merged(experts, tuned.method)))
    return found | {"seconds": time.process_time() - started}


def _start(world: Experts, kind: str, method: MergeMethod) -> Path:
    """Return where a merge is, or will be, that searches start from."""
    settings = hashlib.sha256(repr(method).encode()).hexdigest()[:8]
    return world.expert("merged", f"{kind}-{type(method).__name__}-{settings}-of-{len(world.tasks)}")


def _write_starts(world: Experts, kind: str, way: Way) -> None:
    """Write the merges that a search starts from; several searches share one, so no process of a piece does it."""
    for method in way.merges:
        if not (place := _start(world, kind, method)).exists():
            write_merged(Merged([open_expert(world.expert(kind, task)) for task in world.tasks], method), place)


def _scaled(world: Experts, experts: Sequence[Any], method: MergeMethod, objective: Objective) -> dict[str, Any]:
    """Merge once, and test the merge at the method's own scale and at that of the lowest loss."""
    has_scale = "scale" in {field.name for field in fields(method)}  # type: ignore[arg-type]
    vector = dict(Merged(experts, replace(method, scale=1.0) if has_scale else method))  # type: ignore[type-var]
    own = method.scale if has_scale else 1.0  # type: ignore[attr-defined]
    losses = {scale: objective.losses_with(vector, scale) for scale in sorted({own, *world.scales})}
    best = min(losses, key=lambda scale: fmean(losses[scale].values()))
    tested = {scale: _tested(world, world.tasks, vector, scale) for scale in sorted({own, best})}
    return {"loss": losses[best], "settings": {"scale": best}, "plain": tested[own], "tuned": tested[best]}


def _tested(
    world: Experts, tasks: Sequence[str], vector: Any, scale: float = 1.0, held_out: bool = True
) -> dict[str, dict[str, float]]:
    """Return the exact match and the loss of each task, and of the held-out ones, on its test rows."""
    data = world.mixture(tasks, held_out)
    data.setup("test")
    with applied(world.model, vector, scale, check=False):
        scores = measure(world.model, world.tokenizer, data.test_dataloader(), data.roles, world.new_tokens)["tasks"]
    return {key: {task: facts[key] for task, facts in scores.items()} for key in ("exact_match", "loss")}


def _rows(
    of_base: Sequence[dict[str, Any]],
    singles: Sequence[dict[str, Any]],
    merges: Sequence[dict[str, Any]],
    kinds: Sequence[str],
    names: Sequence[str],
) -> list[dict[str, Any]]:
    """Return a row for each kind and method: scores, shares of the singles', differences to the reference."""
    rows = []
    for kind in kinds:
        alone = [r for r in singles if r["piece"][1] == kind]
        tasks = {r["piece"][2] for r in alone}
        of_kind = {name: [r for r in merges if r["piece"][1:] == [kind, name]] for name in names}
        reference = _pairs(of_kind[REFERENCE], "tuned", "exact_match", tasks)
        for name, results in of_kind.items():
            row: dict[str, Any] = {"kind": kind, "method": name}
            row |= {"base": _means(of_base, "tested", tasks), "single": _means(alone, "tested", tasks)}
            row |= {column: _means(results, column, tasks) for column in ("plain", "tuned") if column in results[0]}
            row["kept"] = row["tuned"]["exact_match"] / max(row["single"]["exact_match"], 1e-9)
            row["difference"] = interval(_pairs(results, "tuned", "exact_match", tasks), reference)
            row["validation loss"] = fmean(fmean(r["loss"].values()) for r in results)
            row["settings"] = [r["settings"] for r in results]
            rows.append(row)
    return rows


def _means(results: Sequence[dict[str, Any]], column: str, tasks: set[str]) -> dict[str, float]:
    """Return the means over held-in tasks and seeds of what is measured, and those over the other tasks."""
    found = {}
    for score in ("exact_match", "loss"):
        found[score] = fmean(_pairs(results, column, score, tasks).values())
        if others := _pairs(results, column, score, tasks, held_in=False):
            found[f"held out {score}"] = fmean(others.values())
    return found


def _pairs(
    results: Sequence[dict[str, Any]], column: str, score: str, tasks: set[str], held_in: bool = True
) -> dict[tuple[int, str], float]:
    """Return a score by pair of seed and task: of the held-in tasks, or of the others."""
    scores = {(r["piece"][0], task): value for r in results for task, value in r[column][score].items()}
    return {pair: value for pair, value in scores.items() if (pair[1] in tasks) == held_in}


def _print(rows: Sequence[dict[str, Any]], seeds: Sequence[int]) -> None:
    print(f"exact match in % / loss in nats per token, means over tasks and seeds {', '.join(map(str, seeds))}; kept:")
    print(f"tuned over the single experts; in brackets the 95 % interval of the difference to tuned {REFERENCE};")
    print("+ where the base's loss on held-out tasks is lower; best first")
    for kind in dict.fromkeys(row["kind"] for row in rows):
        mine = [row for row in rows if row["kind"] == kind]
        heading = "method | plain | tuned | | kept | plain, held out | tuned, held out | settings"
        print(f"\n{kind}\n\n| {heading} |\n" + "|---" * 8 + "|")
        base, single = mine[0]["base"], mine[0]["single"]
        print(f"| the base | {_both(base)} | | | | {_both(base, 'held out ')} | | |")
        print(f"| the experts alone | {_both(single)} | | | | | | |")
        for row in sorted(mine, key=lambda row: -row["tuned"]["exact_match"]):
            print("| " + " | ".join(_cells(row)) + " |")


def _cells(row: dict[str, Any]) -> Iterator[str]:
    low, high = row["difference"]
    yield row["method"]
    yield _both(row["plain"]) if "plain" in row else ""
    yield _both(row["tuned"])
    yield f"[{100 * low:+.1f}, {100 * high:+.1f}]" if row["method"] != REFERENCE else ""
    yield f"{100 * row['kept']:.0f}"
    for column in ("plain", "tuned"):
        worse = column in row and row[column]["held out loss"] > row["base"]["held out loss"]
        yield _both(row[column], "held out ") + (" +" if worse else "") if column in row else ""
    keys = sorted({key for settings in row["settings"] for key in settings})
    yield "; ".join(f"{key} {', '.join(f'{s[key]:.3g}' for s in row['settings'])}" for key in keys)


def _both(scores: dict[str, float], of: str = "") -> str:
    return f"{100 * scores[f'{of}exact_match']:.1f} / {scores[f'{of}loss']:.2f}"


if __name__ == "__main__":
    main()
