"""Which training makes experts that are good alone and merged: rates, their shapes, averages, other experts, sharpness.

Experts of ten tasks of the generated suite are trained in each way (`training_ways.py`) and tested alone. Then the ten
are merged, data-free, by three methods: as each comes, and at the scale with the lowest loss on validation words. Shown
are exact match in %, on the ten tasks and on the held-out ones, the 95 % interval of the difference to the kind's
reference (a bootstrap over the pairs of seed and task), and the CPU time of the training over the reference's.

    python benchmarks/training_for_merging.py [--parts rates shapes ways] [--kinds entries ...] [--seeds 0 1 2]

What is done stays in `--work`, so a run that was stopped goes on where it was, and a table can be shown again.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from intervals import interval
from selection_worlds import Generated, model_of, tokenizer_of
from training_ways import AVERAGES, EXPERTS, SHAPES, WAYS, Setting, folder, train

from modular_experts.base.apply import applied
from modular_experts.data import TaskMixture
from modular_experts.evaluation import measure
from modular_experts.jobs import JSONLines, Piece, print_progress, run
from modular_experts.library import open_expert
from modular_experts.merger.merged import Merged
from modular_experts.methods import IsoC, MergeMethod, SelfRegMean, SparseAverage

REFERENCE = {
    kind: Setting(kind, rate)
    for kind, rate in {"sparse": 1e-3, "block": 1e-3, "row": 1e-3, "lora": 3e-3, "full": 1e-3}.items()
}
"""The kinds, and the rates of the quickstart, at which shapes and ways are compared."""

RATES = {
    "sparse": (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
    "block": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2),
    "row": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
    "lora": (7.5e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2),
    "full": (1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3),
}

METHODS: dict[str, MergeMethod] = {"SparseAverage": SparseAverage(), "SelfRegMean": SelfRegMean(), "IsoC": IsoC()}
"""The last one, for want of time, only for LoRAs, where it is the best method without data."""
SCALES = {
    ("SparseAverage", True): (0.35, 0.5, 0.75, 1.0, 1.4, 2.0),
    ("SparseAverage", False): (1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
    ("SelfRegMean", True): (0.35, 0.5, 0.75, 1.0, 1.4),
    ("SelfRegMean", False): (0.2, 0.35, 0.5, 0.75, 1.0, 1.4),
    ("IsoC", True): (0.5, 0.75, 1.0, 1.4, 2.0, 3.0),
    ("IsoC", False): (0.5, 0.75, 1.0, 1.4, 2.0),
}


def main() -> None:
    options = _options()
    settings = list(dict.fromkeys(s for kind in options.kinds for part in options.parts for s in _settings(part, kind)))
    work = Path(options.work)
    worlds = {seed: Generated(seed, work) for seed in options.seeds}
    assert all(world.base.exists() for world in worlds.values())
    store = JSONLines(work / "training.jsonl")
    # Ways that train under other experts need those of the plain way.
    for group in ([s for s in settings if s.way == "plain"], [s for s in settings if s.way != "plain"]):
        pieces = [Piece((seed, s.label), _measure, (worlds[seed], s)) for s in group for seed in options.seeds]
        if options.show:
            continue
        with ThreadPoolExecutor(1) as pool:
            run(pieces, store, pool, print_progress()).raise_failures()
    found = {(seed, s): store[seed, s.label] for s in settings for seed in options.seeds if (seed, s.label) in store}
    rows = list(_rows(found))
    if options.json:
        json.dump({"seeds": options.seeds, "rows": rows}, sys.stdout, indent=2)
    else:
        _print(rows, options.seeds)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["rates", "shapes", "ways"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--kinds", nargs="+", choices=list(EXPERTS), default=list(EXPERTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--work", default="runs/training-for-merging", help="directory for bases, experts and results")
    parser.add_argument("--show", action="store_true", help="show what is there, and train nothing")
    parser.add_argument("--json", action="store_true", help="print only JSON")
    return parser.parse_args()


def _settings(part: str, kind: str) -> list[Setting]:
    reference = REFERENCE[kind]
    if part == "rates":
        return [reference, *(replace(reference, rate=rate) for rate in RATES[kind])]
    if part == "shapes":
        shapes = [replace(reference, shape=shape) for shape in SHAPES]
        return shapes + [replace(reference, batch=batch) for batch in (8, 32)]
    return [reference, replace(reference, shape="constant"), *(replace(reference, way=way) for way in WAYS)]


def _measure(world: Any, setting: Setting) -> dict[str, Any]:
    """Train the experts of a setting, and test them, and their averages, alone and merged."""
    logging.getLogger("modular_experts").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    library = (world.work / f"library-{world.seed}" / folder(setting.label)).absolute()
    plain = library.parent / folder(replace(setting, way="plain").label)
    averaged = [replace(REFERENCE[setting.kind], shape=shape) for shape in ("linear", "constant")]
    averages = AVERAGES if setting in averaged else ()
    seconds = []
    for task in world.tasks:
        others = [plain / other for other in world.tasks if other != task]
        seconds.append(train(world, setting, task, library, others if setting.way != "plain" else (), averages))
    found: dict[str, Any] = {"seconds": fmean(seconds)}
    for name in ("last state", *averages):
        paths = {task: (library if name == "last state" else library / folder(name)) / task for task in world.tasks}
        found[name] = _tested(world, paths, setting.kind)
    return found


def _tested(world: Any, experts: dict[str, Path], kind: str) -> dict[str, Any]:
    """Return the scores of experts alone, and merged by each method as it comes and at its best scale."""
    model, tokenizer = model_of(world.base), tokenizer_of(world.base)
    alone, losses = {}, []
    for task, path in experts.items():
        data = _data(world, (task,), held_out=False)
        with applied(model, open_expert(path), check=False):
            losses.append(measure(model, tokenizer, data.val_dataloader(), data.roles, None)["held_in"]["loss"])
            scores = measure(model, tokenizer, data.test_dataloader(), data.roles, world.new_tokens)
        alone[task] = scores["tasks"][task]["exact_match"]
    found: dict[str, Any] = {"alone": alone, "loss": fmean(losses)}
    data = _data(world, tuple(experts), held_out=True)
    for name in _methods(kind):
        method = METHODS[name]
        merged = Merged(list(experts.values()), method)
        deltas = {weight: merged[weight] for weight in merged}
        by_scale = {}
        for scale in SCALES[name, kind in ("sparse", "block", "row")]:
            with applied(model, deltas, scale, check=False):
                by_scale[scale] = measure(model, tokenizer, data.val_dataloader(), data.roles, None)["held_in"]["loss"]
        best = min(by_scale, key=by_scale.__getitem__)
        found[name] = {"scale": best, "loss": by_scale[best], "loss plain": by_scale[1.0]}
        for column, scale in {"plain": 1.0, "tuned": best}.items():
            if column == "tuned" and best == 1.0:
                found[name]["tuned"] = found[name]["plain"]
                continue
            with applied(model, deltas, scale, check=False):
                scores = measure(model, tokenizer, data.test_dataloader(), data.roles, world.new_tokens)
            found[name][column] = {task: facts["exact_match"] for task, facts in scores["tasks"].items()}
    return found


@cache
def _data(world: Any, names: tuple[str, ...], held_out: bool) -> TaskMixture:
    data = world.mixture(list(names), held_out)
    data.setup("validate")
    data.setup("test")
    return data


def _methods(kind: str) -> list[str]:
    return [name for name in METHODS if name != "IsoC" or kind == "lora"]


def _rows(found: dict[tuple[int, Setting], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield a row for each setting and average of which some seed was measured."""
    for setting in dict.fromkeys(setting for _, setting in found):
        mine = {seed: result for (seed, s), result in found.items() if s == setting}
        reference = {s: r for (s, one), r in found.items() if one == REFERENCE[setting.kind]}
        for name in [key for key in next(iter(mine.values())) if key != "seconds"]:
            seeds = [seed for seed in mine if name in mine[seed]]
            row: dict[str, Any] = {"kind": setting.kind, "rate": setting.rate, "seeds": seeds}
            row |= {"way": setting.label.partition(", ")[2] + (f", {name}" if name != "last state" else "")}
            costs = [mine[s]["seconds"] / reference[s]["seconds"] for s in seeds if s in reference]
            row["cost"] = fmean(costs) if costs else None
            row["loss"] = fmean(mine[s][name]["loss"] for s in seeds)
            for column, pick in _columns(setting.kind):
                scores, others = (
                    {(s, task): value for s in seeds for task, value in pick(group[s], which).items()}
                    if all(s in group for s in seeds)
                    else {}
                    for group, which in ((mine, name), (reference, "last state"))
                )
                row[column] = fmean(scores.values())
                row[f"{column} difference"] = interval(scores, others) if others else None
            for method in _methods(setting.kind):
                row[f"{method} scale"] = fmean(mine[s][name][method]["scale"] for s in seeds)
                row[f"{method} loss"] = fmean(mine[s][name][method]["loss"] for s in seeds)
                row[f"{method} loss plain"] = fmean(mine[s][name][method]["loss plain"] for s in seeds)
            yield row


def _columns(kind: str) -> Iterator[tuple[str, Any]]:
    """Yield the name of each column of scores, and what reads its scores by task from a result."""
    yield "alone", lambda result, name: result[name]["alone"]
    for method in _methods(kind):
        for column in ("plain", "tuned"):
            for role in ("in", "out"):

                def pick(result: Any, name: str, method: str = method, column: str = column, role: str = role) -> Any:
                    scores, held_in = result[name][method][column], result[name]["alone"]
                    return {task: value for task, value in scores.items() if (task in held_in) == (role == "in")}

                yield f"{method} {column} {role}", pick


def _print(rows: Sequence[dict[str, Any]], seeds: Sequence[int]) -> None:
    print("exact match in %, held in / held out, mean over tasks and seeds; tuned, and in brackets as it comes;")
    print("in square brackets the 95 % interval of the difference to the kind's reference; CPU: over the reference's")
    for kind in dict.fromkeys(row["kind"] for row in rows):
        methods = _methods(kind)
        print(f"\n{kind}\n\n| rate, shape, rows, way | seeds | CPU | alone | | {' | | '.join(methods)} | |")
        print("|---" * (5 + 2 * len(methods)) + "|")
        for row in (row for row in rows if row["kind"] == kind):
            print("| " + " | ".join(_cells(row)) + " |")


def _cells(row: dict[str, Any]) -> Iterator[str]:
    yield row["way"]
    yield " ".join(map(str, row["seeds"]))
    yield "" if row["cost"] is None else f"{row['cost']:.2f}"
    yield f"{100 * row['alone']:.1f}"
    yield _difference(row["alone difference"])
    for method in _methods(row["kind"]):
        inside, outside, plain_in, plain_out = (
            100 * row[f"{method} {column} {role}"] for column in ("tuned", "plain") for role in ("in", "out")
        )
        yield f"{inside:.1f} / {outside:.1f} ({plain_in:.1f} / {plain_out:.1f})"
        yield _difference(row[f"{method} tuned in difference"])


def _difference(interval: Sequence[float] | None) -> str:
    return (
        "" if interval is None or interval == [0.0, 0.0] else "[{:+.1f}, {:+.1f}]".format(*(100 * b for b in interval))
    )


if __name__ == "__main__":
    main()
