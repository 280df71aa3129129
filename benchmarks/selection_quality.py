"""Which entries are best to train, and which experts merge best: scores, schedules, units and keep ratios.

For each way to choose (`selection_variants.py`) and each seed, an expert is trained for every one of ten generated
tasks and tested alone; then the ten are merged, at the scale with the lowest loss on validation words, and tested on
their own tasks and on held-out ones. Every way counts at the better of its learning rates, by the loss on validation
words. What is shown is exact match in %, and the difference to the reference with a 95 % interval: a bootstrap over the
pairs of seed and task, which all ways share.

    python benchmarks/selection_quality.py [--parts scores ratios ...] [--seeds 0 1 2] [--work DIR] [--json]
    python benchmarks/selection_quality.py --real .cache/smollm2 DATA

The second form trains a pretrained base on three task files, with one learning rate and as many steps as time allows.

All parts with three seeds take about 20 minutes on two idle cores. What is done stays in `--work`, so a run that was
stopped goes on where it was, and a table can be shown again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from intervals import interval
from lightning.pytorch import Trainer, seed_everything
from selection_variants import REAL, REFERENCE, VARIANTS, Variant
from selection_worlds import QUIET, Generated, Real, make_bases, model_of, tokenizer_of
from torch.optim import AdamW

from modular_experts.base.apply import applied
from modular_experts.callbacks import ExportExpert, MaskSchedule
from modular_experts.data import TaskMixture
from modular_experts.evaluation import measure
from modular_experts.jobs import JSONLines, LocalProcesses, Piece, print_progress, run
from modular_experts.library import open_expert
from modular_experts.masks import SelectOnce
from modular_experts.merger.merged import merge
from modular_experts.methods import Average, SparseAverage
from modular_experts.quickstart.plan import MODULES
from modular_experts.training.module import ExpertModule

SCALES = {"sparse": (0.35, 0.5, 0.75, 1.0, 1.4), "dense": (1.0, 1.5, 2.0, 3.0, 4.0)}


def main() -> None:
    options = _options()
    work = Path(options.work)
    parts = options.parts or ([] if options.real else sorted({variant.part for variant in VARIANTS.values()}))
    names = [name for name, variant in VARIANTS.items() if variant.part in parts or name == REFERENCE]
    names = list(dict.fromkeys(names + (REAL if options.real and not options.parts else [])))
    names = [name for name in names if any(word in name for word in options.only)] if options.only else names
    pieces = [(seed, name, rate) for seed in options.seeds for name in names for rate in _rates(name, options)]
    worlds = {seed: _world(options, seed) for seed in options.seeds}
    make_bases(world.base for world in worlds.values())
    store = JSONLines(work / "results.jsonl")
    measured = [Piece(piece, _measure, (worlds[piece[0]], *piece)) for piece in pieces]
    with LocalProcesses(options.processes or os.cpu_count()) as pool:
        run(measured, store, pool, print_progress()).raise_failures()
    rows = _rows([store[piece] for piece in pieces])
    if options.json:
        json.dump({"tasks": worlds[options.seeds[0]].tasks, "seeds": options.seeds, "rows": rows}, sys.stdout, indent=2)
    else:
        _print(rows, options.seeds)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = sorted({variant.part for variant in VARIANTS.values()})
    parser.add_argument("--parts", nargs="+", choices=parts)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="only ways with such a word in the name")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--processes", type=int, help="how many at once; one for each core if not given")
    parser.add_argument("--work", help="directory for bases and results")
    parser.add_argument(
        "--real", nargs=2, metavar=("BASE", "DATA"), help="a pretrained base and a folder of task files"
    )
    parser.add_argument("--json", action="store_true", help="print only JSON")
    options = parser.parse_args()
    options.seeds = options.seeds or ([0] if options.real else [0, 1, 2])
    options.work = options.work or ("runs/selection-real" if options.real else "runs/selection")
    return options


def _world(options: argparse.Namespace, seed: int) -> Generated | Real:
    return Real(seed, *map(Path, options.real)) if options.real else Generated(seed, Path(options.work))


def _rates(name: str, options: argparse.Namespace) -> tuple[float, ...]:
    """Return the learning rates that are tried; on real tasks there is time for one."""
    return (VARIANTS[name].real_rate,) if options.real else VARIANTS[name].rates


def _measure(world: Any, seed: int, name: str, rate: float) -> dict[str, Any]:
    """Train the experts of one way, test them, merge them and test the merge."""
    logging.getLogger("modular_experts").setLevel(logging.ERROR)
    variant = VARIANTS[name]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder)
        singles = {task: _single(world, library, variant, rate, task) for task in world.tasks}
        merged = _merged(world, library, variant)
    own = {key: fmean(single[key] for single in singles.values()) for key in ("loss", "kept", "touched", "overlap")}
    exact = {task: single["exact"] for task, single in singles.items()}
    return {"seed": seed, "variant": name, "rate": rate, "single": own | {"tasks": exact}, "merged": merged}


def _single(world: Any, library: Path, variant: Variant, rate: float, task: str) -> dict[str, Any]:
    data = world.mixture([task])
    module, schedule = _train(world, data, library / task, variant, rate, _neighbours(world, library, variant))
    stored = open_expert(library / task)
    data.setup("validate")
    loss = measure(module.model, module.tokenizer, data.val_dataloader(), data.roles, None)["held_in"]["loss"]
    data.setup("test")
    scores = measure(module.model, module.tokenizer, data.test_dataloader(), data.roles, world.new_tokens)
    shares = schedule.shares(module) or {"kept": 1.0, "ever_trained": 1.0}
    return {
        "loss": loss,
        "exact": scores["tasks"][task]["exact_match"],
        "kept": shares["kept"],
        "touched": shares["ever_trained"],
        "overlap": stored.record["costs"].get("overlap", 0.0),
    }


def _train(
    world: Any, data: TaskMixture, out: Path, variant: Variant, rate: float, more: dict[str, Any], steps: int = 0
) -> tuple[ExpertModule, MaskSchedule]:
    seed_everything(world.seed, verbose=False)
    schedule = MaskSchedule(**({"batches": 1} | (variant.schedule or {}) | more))
    optimizer = partial(AdamW, lr=rate, weight_decay=0.0)
    module = ExpertModule(str(world.base), modules=MODULES, expert=variant.expert, optimizer=optimizer)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps or world.steps,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        use_distributed_sampler=False,
        callbacks=[ExportExpert(str(out.parent), out.name, monitor=None), schedule],
        default_root_dir=out.parent,
        **QUIET,
    )
    trainer.fit(module, data)
    return module, schedule


def _neighbours(world: Any, library: Path, variant: Variant) -> dict[str, Any]:
    """Return what the next expert's schedule is told of the experts that are there."""
    if variant.neighbours is None:
        return {}
    if variant.neighbours == "share":
        shared = library / "shared"
        if not shared.exists():  # chosen once, on all the tasks together
            everything = Variant("", variant.expert, {"rule": SelectOnce(), "batches": 10})
            _train(world, world.mixture(world.tasks), shared, everything, 1e-9, {}, steps=1)
        return {"support": str(shared)}
    others = sorted(str(path) for path in library.iterdir() if (path / "expert.json").exists())
    penalty = None if variant.neighbours == "exclude" else variant.neighbours
    return {"avoid": others, "penalty": penalty} if others else {}


def _merged(world: Any, library: Path, variant: Variant) -> dict[str, Any]:
    """Merge, in place on the loaded base, at each scale; the lowest loss on validation rows chooses."""
    sparse = variant.schedule is not None
    method = SparseAverage() if sparse else Average()
    expert = merge([library / task for task in world.tasks], method, library / "merged")
    model, tokenizer = model_of(world.base), tokenizer_of(world.base)
    data, losses = world.mixture(world.tasks), {}
    data.setup("validate")
    for scale in SCALES["sparse" if sparse else "dense"]:
        with applied(model, expert, scale, check=False):
            losses[scale] = measure(model, tokenizer, data.val_dataloader(), data.roles, None)["held_in"]["loss"]
    data = world.mixture(world.tasks, held_out=True)
    data.setup("test")
    chosen, found = min(losses, key=losses.__getitem__), {}
    for name, scale in (("chosen", chosen), ("plain", 1.0)):
        with applied(model, expert, scale, check=False):
            scores = measure(model, tokenizer, data.test_dataloader(), data.roles, world.new_tokens)
        found[name] = {task: facts["exact_match"] for task, facts in scores["tasks"].items()}
    return {"scale": chosen, "loss": losses[chosen], "kept": expert.kept_share, **found}


def _rows(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row a way, at its better learning rate for singles and for merges, beside the reference."""
    reference = _best(results, REFERENCE if any(r["variant"] == REFERENCE for r in results) else results[0]["variant"])
    rows = []
    for name in dict.fromkeys(variant for variant in VARIANTS if any(r["variant"] == variant for r in results)):
        best = _best(results, name)
        row: dict[str, Any] = {"part": VARIANTS[name].part, "variant": name}
        for column, (rate, pairs) in best.items():
            low, high = interval(pairs, reference[column][1])
            row[column] = {"rate": rate, "mean": fmean(pairs.values()), "difference": [low, high]}
        mine = [r for r in results if r["variant"] == name and r["rate"] == best["merged"][0]]
        row |= {key: fmean(r["single"][key] for r in mine) for key in ("kept", "touched", "overlap")}
        row["scale"] = fmean(r["merged"]["scale"] for r in mine)
        rows.append(row)
    return rows


def _best(results: Sequence[dict[str, Any]], name: str) -> dict[str, tuple[float, dict[tuple[int, str], float]]]:
    """Return for each column the learning rate that counts, and the score of each pair of seed and task."""
    mine = [r for r in results if r["variant"] == name]
    rates = sorted({r["rate"] for r in mine})
    loss = {
        part: {rate: fmean(r[part]["loss"] for r in mine if r["rate"] == rate) for rate in rates}
        for part in ("single", "merged")
    }
    single, merged = (min(rates, key=loss[part].__getitem__) for part in ("single", "merged"))
    held_in = set(mine[0]["single"]["tasks"])
    columns = {
        "single": (single, lambda r: r["single"]["tasks"]),
        "merged": (merged, lambda r: {t: v for t, v in r["merged"]["chosen"].items() if t in held_in}),
        "plain": (merged, lambda r: {t: v for t, v in r["merged"]["plain"].items() if t in held_in}),
        "held_out": (merged, lambda r: {t: v for t, v in r["merged"]["chosen"].items() if t not in held_in}),
    }
    return {
        column: (rate, {(r["seed"], t): v for r in mine if r["rate"] == rate for t, v in pick(r).items()})
        for column, (rate, pick) in columns.items()
    }


def _print(rows: Sequence[dict[str, Any]], seeds: Sequence[int]) -> None:
    print(f"exact match in %, mean over tasks and seeds {', '.join(map(str, seeds))}; in brackets the 95 %")
    print(f"interval of the difference to '{REFERENCE}'; merged: all at the chosen scale, overlap-aware,")
    print("and by the plain average for LoRA and full")
    heading = ("way", "single", "", "merged", "", "scale 1", "held out", "", "touched", "scale", "rates")
    print("| " + " | ".join(heading) + " |\n|" + "---|" * len(heading))
    for row in rows:
        print("| " + " | ".join(_cells(row)) + " |")


def _cells(row: dict[str, Any]) -> Iterator[str]:
    yield row["variant"].replace("|", "\\|")  # the table is Markdown
    for column in ("single", "merged", "plain", "held_out"):
        yield f"{100 * row[column]['mean']:.1f}"
        if column != "plain":
            low, high = (100 * bound for bound in row[column]["difference"])
            yield "" if row["variant"] == REFERENCE else f"[{low:+.1f}, {high:+.1f}]"
    yield f"{100 * row['touched']:.0f} %"
    yield f"{row['scale']:.2g}"
    yield f"{row['single']['rate']:g}, {row['merged']['rate']:g}"


if __name__ == "__main__":
    main()
