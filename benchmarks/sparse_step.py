"""What a training step costs by expert type, beside PEFT's: time, peak memory, optimizer state, and re-selections.

All take their steps in turn in one process, on one thread, in an order drawn anew for each round; the numbers are
ratios of medians of CPU time. Peak memory is that of two steps in a process of their own, imports and model included.
The rows are made in `contenders`; goals and tables are in `step_report`.

    python benchmarks/sparse_step.py                       all three parts: about 22 minutes on two idle cores
    python benchmarks/sparse_step.py --model               a whole Llama of 135 M parameters: 9 minutes, 6 GB of memory
    python benchmarks/sparse_step.py --layers --keep 0.01 0.05 0.1    single layers: 10 minutes per share
    python benchmarks/sparse_step.py --selection           choosing what is trained anew: 3 minutes
    python benchmarks/sparse_step.py --quick               everything in small, to see that it runs: less than a minute
"""

import argparse
import importlib
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from contenders import CONTENDERS, Contender, Step, Work, language_model, missing, single_layer
from measuring import Parser, high_water, in_own_process, machine, race
from step_report import goals, text

from modular_experts.injection import expert_layers

SHAPES = [(576, 576), (1536, 576), (576, 1536), (3072, 3072), (3072, 8192), (8192, 3072)]
TOKENS = [512, 2048]
CHOOSING = ["entries, sampled", "tiles of 16, block_rows", "rows, slices", "columns, slices"]
REFERENCES = ["frozen", "PEFT LoRA", "PEFT SHiRA", "dense, masked"]
QUICK_PEAKS, QUICK_CHOOSING = ["PEFT LoRA", "dense, masked"], ["tiles of 16, block_rows"]
WARM_UP = 2
PROCESS_SECONDS = 12.0  # a process that imports, makes the model and takes two steps


class Progress:
    """Counts what is done, in seconds as guessed beforehand, and says on standard error what is left."""

    def __init__(self, total: float) -> None:
        self.total, self.done, self.started, self.said = total, 0.0, time.monotonic(), 0.0

    def advance(self, seconds: float, what: str) -> None:
        self.done += seconds
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if now - self.said < (0.5 if terminal else 20):
            return
        self.said = now
        left = (now - self.started) * max(0.0, self.total / self.done - 1)
        line = f"{min(1.0, self.done / self.total):4.0%}, {left // 60:.0f} min {left % 60:2.0f} s left: {what}"
        print(f"\r\033[K{line}" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)

    def close(self) -> None:
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr)


def guess(entries: int, tokens: int) -> float:
    """Return about how many seconds a step takes, from its operations; for the progress and the number of rounds."""
    return 0.002 + 5.6 * entries * tokens / 1.5e11


def compare(contenders: list[Contender], work: Work, rounds: int, progress: Progress) -> list[dict[str, Any]]:
    """Return a row per contender: time over that of the references, over the floor, and what is trained."""
    steps = {contender.name: Step(contender, work) for contender in contenders}
    cost = guess(work.entries, work.tokens)

    def rest(name: str) -> None:
        steps[name].rest()  # takes its writes out of the shared base
        progress.advance(cost, name)

    seconds = race(steps, rounds, WARM_UP, rest)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    rows: list[dict[str, Any]] = []
    for contender in contenders:
        name, facts = contender.name, steps[contender.name].facts()
        over = {
            f"over_{key}": median[name] / median[other]
            for key, other in zip(["frozen", "lora", "shira", "masked"], REFERENCES, strict=True)
        }
        floor, kept = contender.floor(work, facts["kept"]), facts["kept"]
        moments = facts["optimizer_bytes"] - facts.pop("counter_bytes")
        rows.append(
            {"name": name, **over, "floor": floor, "over_floor": over["over_frozen"] / floor, **facts}
            | {"shortest_over_frozen": min(seconds[name]) / min(seconds["frozen"])}
            | {"spread": (max(seconds[name]) - min(seconds[name])) / median[name]}
            | {"optimizer_bytes_per_kept": facts["optimizer_bytes"] / kept if kept else None}
            | {"moment_bytes_per_kept": moments / kept if kept else None}
        )
    lora = next(row["kept"] for row in rows if row["name"] == "PEFT LoRA")
    return [row | {"kept_over_lora": row["kept"] / lora} for row in rows]


def measure_model(work: Work, contenders: list[Contender], options: argparse.Namespace, progress: Progress) -> dict:
    """Return the table of the whole model; the peaks come first, while this process is small."""
    peaks = {}
    for contender in contenders:
        if not options.quick or contender.name in QUICK_PEAKS:
            peaks[contender.name] = peak(contender.name, options.quick)["steps"]
            progress.advance(PROCESS_SECONDS, f"memory of {contender.name}")
    rows = compare(contenders, work, options.repeats, progress)
    for row in rows:
        for key, other in {"lora": "PEFT LoRA", "masked": "dense, masked"}.items():
            own = peaks.get(row["name"])
            row[f"peak_over_{key}"] = None if own is None else own / peaks[other]
    parameters = sum(parameter.numel() for parameter in work.base.parameters())
    facts = {"parameters": parameters, "tokens": work.tokens, "rank": work.rank, "keep": work.keep}
    return facts | {"repeats": options.repeats, "rows": rows}


def layer_plan(options: argparse.Namespace) -> list[tuple[tuple[int, int], int, float, int]]:
    """Return shape, tokens, share and number of rounds for each table of a layer; large layers take fewer rounds."""
    shapes, tokens = ([(256, 256)], [64]) if options.quick else (SHAPES, TOKENS)
    pairs = [(shape, count) for shape in shapes for count in tokens]
    pairs = [(shape, count) for shape, count in pairs if shape[0] * shape[1] * count <= 3072 * 3072 * 2048]  # for time
    plan = [(*pair, keep) for keep in options.keep for pair in pairs]
    rounds = [round(options.repeats / guess(shape[0] * shape[1], count) / 2) for shape, count, _ in plan]
    most = options.repeats if options.quick else 21
    return [(*entry, max(3, min(most, number))) for entry, number in zip(plan, rounds, strict=True)]


def measure_layers(contenders: list[Contender], options: argparse.Namespace, progress: Progress) -> list[dict]:
    """Return a table for each layer, number of tokens and share."""
    tables = []
    for shape, tokens, keep, rounds in layer_plan(options):
        work = single_layer(shape, tokens, keep)
        facts = {"shape": list(shape), "tokens": tokens, "keep": work.keep, "rank": work.rank, "repeats": rounds}
        tables.append(facts | {"rows": compare(contenders, work, rounds, progress)})
    return tables


def select(step: Step) -> None:
    """Take a step in which every layer chooses its support anew, from the step's own gradient."""
    from modular_experts.selection.choice import Choice  # Lightning comes with these, which no step needs
    from modular_experts.selection.exchange import Exchange
    from modular_experts.selection.from_step import StepChoice

    layers: dict[str, Any] = dict(expert_layers(step.model))
    choice = StepChoice(Choice(layers, position=100, last=1000))
    choice.next_part(is_last=True)

    def exchange() -> None:
        chosen, _ = choice.finish()
        assert step.optimizer is not None
        for name, units in chosen.items():
            Exchange().move(name, layers[name], units, [step.optimizer], graded=True)

    step(exchange)


def measure_selection(work: Work, contenders: list[Contender], options: argparse.Namespace, progress: Progress) -> dict:
    """Return what a re-selection in every 100th step costs, in time and in memory beyond a step's."""
    rows, cost = [], guess(work.entries, work.tokens)
    for contender in contenders:
        space = peak(contender.name, options.quick, selection=True)
        progress.advance(PROCESS_SECONDS, f"memory of a selection of {contender.name}")
        step = Step(contender, work)
        calls: dict[str, Callable[[], None]] = {"step": step, "selection": partial(select, step)}

        def rest(what: str, step: Step = step, name: str = contender.name) -> None:
            step.rest()
            progress.advance(cost, f"{what} of {name}")

        seconds = race(calls, 3, WARM_UP, rest)
        median = {what: statistics.median(values) for what, values in seconds.items()}
        share = median["selection"] / median["step"] - 1
        largest = max(rows * columns for rows, columns in work.shapes(work.modules))
        allowed = 4 * largest + 1.3 * 8 * step.facts()["kept"]  # a score and an index are 8 bytes
        extra = max(0, space["selection"] - space["steps"])
        rows.append(
            {"name": contender.name, "over_step": share, "share_of_time": share / 100}
            | {"extra_bytes": extra, "allowed_bytes": allowed, "extra_over_allowed": extra / allowed}
        )
    return {"every": 100, "batches": "step", "rows": rows}


def peak(name: str, quick: bool, selection: bool = False) -> dict[str, int]:
    """Return the peak memory of a contender in a process of its own: after two steps, and after a selection."""
    options = [*(["--quick"] if quick else []), *(["--selection"] if selection else [])]
    return in_own_process(__file__, "--peak", name, *options)


def own_peak(name: str, quick: bool, selection: bool) -> dict[str, int]:
    """Return the peaks of this process, in bytes."""
    if selection:
        importlib.import_module("modular_experts.callbacks")  # its memory is not the selection's
    step = Step(next(row for row in CONTENDERS if row.name == name), language_model(quick), alone=True)
    step()
    step()
    peaks = {"steps": high_water()}
    if selection:
        select(step)
        peaks["selection"] = high_water()
    return peaks


def available(words: list[str]) -> tuple[list[Contender], dict[str, str]]:
    """Return the contenders that can run here, of those asked for, and why the others cannot."""
    asked = [row for row in CONTENDERS if row.name in REFERENCES or any(word in row.name for word in words or [""])]
    reasons = {row.name: missing(row) for row in asked}
    skipped = {name: reason for name, reason in reasons.items() if reason is not None}
    for name, reason in skipped.items():
        print(f"left out: {name}: {reason}", file=sys.stderr)
    return [row for row in asked if row.name not in skipped], skipped


def parse() -> argparse.Namespace:
    """Return the options; without a part, all three are asked for."""
    parser = Parser(__doc__, quick="tiny sizes and two rounds, to see that it runs")
    for part in ("model", "layers", "selection"):
        parser.add_argument(f"--{part}", action="store_true", help="only this part, or those that are named")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.05], help="shares trained of single layers: 0.05")
    parser.add_argument("--repeats", type=int, default=5, help="rounds for the model; layers take 3 to 21: 5")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="only rows with such a word, and the peers"
    )
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if any(not 0 < keep < 0.5 for keep in options.keep):
        parser.error(f"--keep {' '.join(map(str, options.keep))} must lie between 0 and 0.5; 0.05 is five of a hundred")
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats} must be at least 1")
    for word in options.only:
        if not any(word in row.name for row in CONTENDERS):
            names = "; ".join(row.name for row in CONTENDERS)
            parser.error(f"--only {word} is part of no row's name; the rows are: {names}")
    if not (options.model or options.layers or options.selection or options.peak):
        options.model = options.layers = options.selection = True
    options.repeats = min(options.repeats, 2) if options.quick else options.repeats
    return options


def expected(work: Work, number: int, choosing: int, options: argparse.Namespace) -> float:
    """Return about how many seconds all will take, for the progress."""
    step, seconds = guess(work.entries, work.tokens), 0.0
    if options.model:
        processes = len(QUICK_PEAKS) if options.quick else number
        seconds += processes * PROCESS_SECONDS + number * (WARM_UP + options.repeats) * step
    if options.layers:
        steps = [guess(shape[0] * shape[1], t) * (WARM_UP + rounds) for shape, t, _, rounds in layer_plan(options)]
        seconds += number * sum(steps)
    if options.selection:
        seconds += choosing * (PROCESS_SECONDS + 2 * (WARM_UP + 3) * step)
    return seconds


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the whole report."""
    contenders, skipped = available(options.only)
    choosing = [row for row in contenders if row.name in (QUICK_CHOOSING if options.quick else CHOOSING)]
    work = language_model(options.quick)
    progress = Progress(expected(work, len(contenders), len(choosing), options))
    report: dict[str, Any] = {"machine": machine(), "quick": options.quick, "skipped": skipped}
    if options.model:
        report["model"] = measure_model(work, contenders, options, progress)
    if options.selection:
        report["selection"] = measure_selection(work, choosing, options, progress)
    del work
    if options.layers:
        report["layers"] = measure_layers(contenders, options, progress)
    progress.close()
    return report | {"goals": goals(report), "complete": True}


def main() -> None:
    options = parse()
    warnings.filterwarnings("ignore", module="peft|transformers")  # about hooks and sparse tensors of their own
    torch.set_num_threads(1)
    if options.peak:
        print(json.dumps(own_peak(options.peak, options.quick, options.selection)))
        return
    report = measure(options)
    print(json.dumps(report, indent=2) if options.json else text(report))


if __name__ == "__main__":
    main()
