"""Which training makes experts that are good alone and merged: rates, their shapes, averages, other experts, sharpness.

Experts of ten tasks of the generated suite are trained in each way (`training_ways.py`) and tested alone. Then the ten
are merged, data-free, by three methods: as each comes, and at the scale with the lowest loss on validation words. Shown
are exact match in %, on the ten tasks and on the held-out ones, the 95 % interval of the difference to the kind's
reference (a bootstrap over the pairs of seed and task), and the CPU time of the training over the reference's.

    python benchmarks/training_for_merging.py [--parts rates shapes ways] [--kinds entries ...] [--seeds 0 1 2]
    python benchmarks/training_for_merging.py --parts rates --real .cache/smollm2 DATA

The second form takes four real tasks and a pretrained base, in bfloat16, and shows losses of held-out tasks. What is
done stays in `--work`, so a run that was stopped goes on where it was, and a table can be shown again.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from intervals import interval
from selection_worlds import make_bases
from training_ways import AVERAGES, SHAPES, WAYS, Setting, folder, train
from training_worlds import METHODS, SCALES, SPARSE, RealTasks, Suite, World

from modular_experts.base.apply import applied
from modular_experts.data import TaskMixture
from modular_experts.evaluation import measure
from modular_experts.jobs import JSONLines, Piece, print_progress, run
from modular_experts.library import open_expert
from modular_experts.merger.merged import Merged


def main() -> None:
    options = _options()
    work = Path(options.work)
    worlds = {seed: _world(options, seed) for seed in options.seeds}
    make_bases(world.base for world in worlds.values())
    world = worlds[options.seeds[0]]
    settings = [s for kind in options.kinds for part in options.parts for s in _settings(world, part, kind)]
    # Ways that train under other experts need those of the plain way.
    settings = sorted(dict.fromkeys(settings), key=lambda setting: setting.way != "plain")
    store = JSONLines(work / "training.jsonl")
    todo = (
        [] if options.show else [(s, seed) for s in settings for seed in options.seeds if (seed, s.label) not in store]
    )
    for setting, seed in todo:
        world = worlds[seed]
        train = [Piece((seed, setting.label, task), _train, (world, setting, task)) for task in world.tasks]
        with ThreadPoolExecutor(1) as pool:
            run(train, store, pool, print_progress()).raise_failures()
            seconds = fmean(store[piece.key] for piece in train)
            measure = Piece((seed, setting.label), _measure, (world, setting, seconds))
            run([measure], store, pool, print_progress()).raise_failures()
    found = {(seed, s): store[seed, s.label] for s in settings for seed in options.seeds if (seed, s.label) in store}
    rows = list(_rows(found, world))
    if options.json:
        json.dump({"seeds": options.seeds, "rows": rows}, sys.stdout, indent=2)
    else:
        _print(rows, world)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["rates", "shapes", "ways"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--kinds", nargs="+", choices=list(Suite.experts), default=list(Suite.experts))
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--work", help="directory for bases, experts and results")
    parser.add_argument(
        "--real", nargs=2, metavar=("BASE", "DATA"), help="a pretrained base and a folder of task files"
    )
    parser.add_argument(
        "--quick", action="store_true", help="one seed, sparse experts and one rate, to see that it works"
    )
    parser.add_argument("--show", action="store_true", help="show what is there, and train nothing")
    parser.add_argument("--json", action="store_true", help="print only JSON")
    options = parser.parse_args()
    if options.quick:
        options.parts, options.kinds, options.seeds = ["quick"], ["sparse"], [0]
    options.seeds = options.seeds or ([0] if options.real else [0, 1, 2])
    options.work = options.work or ("runs/training-for-merging" + ("-real" if options.real else ""))
    return options


def _world(options: argparse.Namespace, seed: int) -> World:
    work = Path(options.work)
    if options.real:
        path, data = map(Path, options.real)
        return RealTasks(seed, path, data, work)
    return Suite(seed, work)


def _settings(world: World, part: str, kind: str) -> list[Setting]:
    reference = _reference(world, kind)
    if part == "quick":
        return [reference]
    if part == "rates":
        return [reference, *(replace(reference, rate=rate) for rate in world.rates[kind])]
    if part == "shapes":
        shapes = [replace(reference, shape=shape) for shape in SHAPES]
        return shapes + [replace(reference, batch=batch) for batch in (8, 32)]
    return [reference, replace(reference, shape="constant"), *(replace(reference, way=way) for way in WAYS)]


def _reference(world: World, kind: str) -> Setting:
    return Setting(kind, world.references[kind], batch=world.batch_size)


def _library(world: World, setting: Setting) -> Path:
    return (world.work / f"library-{world.seed}" / folder(setting.label)).absolute()


def _averages(world: World, setting: Setting) -> Sequence[str]:
    """Return the averages that are made of a setting's experts."""
    reference = _reference(world, setting.kind)
    return AVERAGES if isinstance(world, Suite) and replace(setting, shape="linear") == reference else ()


def _train(world: World, setting: Setting, task: str) -> float:
    """Train the expert of a task, and return its CPU seconds."""
    logging.getLogger("modular_experts").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    plain = _library(world, replace(setting, way="plain"))
    others = [plain / other for other in world.tasks if other != task] if setting.way != "plain" else ()
    return train(world, setting, task, _library(world, setting), others, _averages(world, setting))


def _measure(world: World, setting: Setting, seconds: float) -> dict[str, Any]:
    """Test the experts of a setting, and their averages, alone and merged."""
    library = _library(world, setting)
    found: dict[str, Any] = {"seconds": seconds}
    for name in ("last state", *_averages(world, setting)):
        paths = {task: (library if name == "last state" else library / folder(name)) / task for task in world.tasks}
        found[name] = _tested(world, paths, setting.kind)
    return found


def _tested(world: World, experts: dict[str, Path], kind: str) -> dict[str, Any]:
    """Return the scores of experts alone, and merged by each method as it comes and at its best scale.

    Scores are exact match, and in the keys with "losses" the loss, by task.
    """
    model = world.model

    def test(data: TaskMixture) -> tuple[dict[str, float], dict[str, float]]:
        tasks = measure(model, world.tokenizer, data.test_dataloader(), data.roles, world.new_tokens)["tasks"]
        return {t: facts["exact_match"] for t, facts in tasks.items()}, {t: facts["loss"] for t, facts in tasks.items()}

    def validate(data: TaskMixture) -> float:
        return measure(model, world.tokenizer, data.val_dataloader(), data.roles, None)["held_in"]["loss"]

    found: dict[str, Any] = {"alone": {}, "alone losses": {}}
    losses = []
    for task, path in experts.items():
        data = _data(world, (task,), held_out=False)
        with applied(model, open_expert(path), check=False):
            losses.append(validate(data))
            exact, loss = test(data)
        found["alone"] |= exact
        found["alone losses"] |= loss
    found["loss"] = fmean(losses)
    data = _data(world, tuple(experts), held_out=True)
    for name in world.methods(kind):
        deltas = dict(Merged(list(experts.values()), METHODS[name]))
        by_scale = {}
        for scale in SCALES[name, kind in SPARSE]:
            with applied(model, deltas, scale, check=False):
                by_scale[scale] = validate(data)
        best = min(by_scale, key=by_scale.__getitem__)
        found[name] = {"scale": best, "loss": by_scale[best], "loss plain": by_scale[1.0]}
        for column, scale in {"plain": 1.0, "tuned": best}.items():
            if column == "tuned" and best == 1.0:
                found[name] |= {"tuned": found[name]["plain"], "tuned losses": found[name]["plain losses"]}
                continue
            with applied(model, deltas, scale, check=False):
                found[name][column], found[name][f"{column} losses"] = test(data)
    return found


@cache
def _data(world: Any, names: tuple[str, ...], held_out: bool) -> TaskMixture:
    data = world.mixture(list(names), held_out)
    data.setup("validate")
    data.setup("test")
    return data


def _rows(found: dict[tuple[int, Setting], dict[str, Any]], world: World) -> Iterator[dict[str, Any]]:
    """Yield a row for each setting and average of which some seed was measured."""
    for setting in dict.fromkeys(setting for _, setting in found):
        mine = {seed: result for (seed, s), result in found.items() if s == setting}
        reference = {s: r for (s, one), r in found.items() if one == _reference(world, setting.kind)}
        for name in [key for key in next(iter(mine.values())) if key != "seconds"]:
            seeds = [seed for seed in mine if name in mine[seed]]
            row: dict[str, Any] = {"kind": setting.kind, "rate": setting.rate, "seeds": seeds}
            row |= {"way": setting.label.partition(", ")[2] + (f", {name}" if name != "last state" else "")}
            costs = [mine[s]["seconds"] / reference[s]["seconds"] for s in seeds if s in reference]
            row["cost"] = fmean(costs) if costs else None
            row["loss"] = fmean(mine[s][name]["loss"] for s in seeds)
            for column, pick in _columns(world.methods(setting.kind)):
                scores, others = (
                    {(s, task): value for s in seeds for task, value in pick(group[s][which]).items()}
                    if all(s in group for s in seeds)
                    else {}
                    for group, which in ((mine, name), (reference, "last state"))
                )
                row[column] = fmean(scores.values())
                row[f"{column} difference"] = interval(scores, others) if others else None
            for method in world.methods(setting.kind):
                row[f"{method} scale"] = fmean(mine[s][name][method]["scale"] for s in seeds)
                row[f"{method} loss"] = fmean(mine[s][name][method]["loss"] for s in seeds)
                row[f"{method} loss plain"] = fmean(mine[s][name][method]["loss plain"] for s in seeds)
            yield row


def _columns(methods: Sequence[str]) -> Iterator[tuple[str, Callable[[Any], dict[str, float]]]]:
    """Yield the name of each column of scores, and what reads its scores by task from a result."""
    for key in ("alone", "alone losses"):
        yield key, lambda result, key=key: result[key]  # type: ignore[misc]
    for method in methods:
        for key, role in product(("plain", "tuned", "plain losses", "tuned losses"), ("in", "out")):

            def pick(result: Any, method: str = method, key: str = key, role: str = role) -> dict[str, float]:
                scores, held_in = result[method][key], result["alone"]
                return {task: value for task, value in scores.items() if (task in held_in) == (role == "in")}

            yield f"{method} {key} {role}", pick


def _print(rows: Sequence[dict[str, Any]], world: World) -> None:
    outside = "loss" if isinstance(world, RealTasks) else "exact match"
    print(f"exact match in % held in / {outside} held out: tuned, and in brackets as it comes; over tasks and seeds;")
    print("in square brackets the 95 % interval of the difference to the kind's reference; CPU: over the reference's")
    for kind in dict.fromkeys(row["kind"] for row in rows):
        methods = world.methods(kind)
        print(f"\n{kind}\n\n| rate, shape, rows, way | seeds | CPU | alone | | {' | | '.join(methods)} | |")
        print("|---" * (5 + 2 * len(methods)) + "|")
        for row in (row for row in rows if row["kind"] == kind):
            print("| " + " | ".join(_cells(row, world)) + " |")


def _cells(row: dict[str, Any], world: World) -> Iterator[str]:
    yield row["way"]
    yield " ".join(map(str, row["seeds"]))
    yield "" if row["cost"] is None else f"{row['cost']:.2f}"
    yield f"{100 * row['alone']:.1f}"
    yield _difference(row["alone difference"])
    for method in world.methods(row["kind"]):
        tuned, plain = (
            f"{100 * row[f'{method} {column} in']:.1f} / "
            + (
                f"{row[f'{method} {column} losses out']:.2f}"
                if isinstance(world, RealTasks)
                else f"{100 * row[f'{method} {column} out']:.1f}"
            )
            for column in ("tuned", "plain")
        )
        yield f"{tuned} ({plain})"
        yield _difference(row[f"{method} tuned in difference"])


def _difference(interval: Sequence[float] | None) -> str:
    return (
        "" if interval is None or interval == [0.0, 0.0] else "[{:+.1f}, {:+.1f}]".format(*(100 * b for b in interval))
    )


if __name__ == "__main__":
    main()
