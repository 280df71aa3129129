"""What a training step costs by expert type, beside PEFT's: time, peak memory, optimizer state, and re-selections.

All take their steps in turn in one process, on one thread, in an order drawn anew for each round; the numbers are
ratios of medians of CPU time. Peak memory is that of two steps in a process of their own, imports and model included.
The rows are made in `contenders`.

    python benchmarks/sparse_step.py                       both parts: about 12 minutes on two idle cores
    python benchmarks/sparse_step.py --model               a whole Llama of 135 M parameters: 9 minutes, 6 GB of memory
    python benchmarks/sparse_step.py --selection           choosing what is trained anew: 3 minutes
    python benchmarks/sparse_step.py --quick               everything in small, to see that it runs: less than a minute
"""

import argparse
import importlib
import json
import statistics
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from contenders import CONTENDERS, Contender, Step, Work, language_model, missing
from measuring import Parser, goal, high_water, in_own_process, output, print_goals, print_machine, print_table, race

from modular_experts.injection import expert_layers

CHOOSING = ["entries, sampled", "tiles of 16, block_rows", "rows, slices", "columns, slices"]
REFERENCES = ["frozen", "PEFT LoRA", "PEFT SHiRA", "dense, masked"]
QUICK_PEAKS, QUICK_CHOOSING = ["PEFT LoRA", "dense, masked"], ["tiles of 16, block_rows"]
WARM_UP = 2
FORMS = {
    "entries": ["entries, sampled", "entries, native"],
    "tiles": ["tiles of 16, block_rows", "tiles of 16, native"],
    "rows": ["rows, slices"],
    "columns": ["columns, slices"],
}
"""Rows of the table by form."""

EVERY, SLICES = [name for names in FORMS.values() for name in names], ["rows, slices", "columns, slices"]
GOALS = [
    ("tiles of 16, PyTorch only: time over PEFT LoRA's", "over_lora", ["tiles of 16, block_rows"], 1.0),
    ("tiles of 16, native: time over PEFT LoRA's", "over_lora", ["tiles of 16, native"], 0.95),
    ("rows and columns: time over PEFT LoRA's", "over_lora", SLICES, 0.94),
    ("rows and columns: time over frozen", "over_frozen", SLICES, 1.05),
    ("entries, PyTorch only: time over PEFT SHiRA's", "over_shira", ["entries, sampled"], 0.8),
    ("entries, native: time over PEFT SHiRA's", "over_shira", ["entries, native"], 0.8),
    ("entries, native: time over PEFT LoRA's", "over_lora", ["entries, native"], 1.0),
    ("every form: time over dense and masked", "over_masked", EVERY, 0.55),
    *((f"{form}: peak memory over PEFT LoRA's", "peak_over_lora", FORMS[form], 1.0) for form in FORMS),
    ("columns: peak memory over PEFT LoRA's, tighter", "peak_over_lora", FORMS["columns"], 0.9),
    ("every form: peak memory over dense and masked", "peak_over_masked", EVERY, 0.5),
    ("every form: bytes of AdamW's moments per kept entry", "moment_bytes_per_kept", EVERY, 8.0),
    ("re-selection every 100 steps: share of the time", "share_of_time", CHOOSING, 0.02),
    ("re-selection: memory beyond a step's, over one layer and 1.3 k", "extra_over_allowed", CHOOSING, 1.0),
]
"""What is measured, its column, the rows of which the worst counts, and the most that it may be."""


def compare(contenders: list[Contender], work: Work, rounds: int) -> list[dict[str, Any]]:
    """Return a row per contender: time over that of the references, over the floor, and what is trained."""
    steps = {contender.name: Step(contender, work) for contender in contenders}
    seconds = race(steps, rounds, WARM_UP, lambda name: steps[name].rest())  # writes leave the shared base
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


def measure_model(work: Work, contenders: list[Contender], options: argparse.Namespace) -> dict[str, Any]:
    """Return the table of the whole model; the peaks come first, while this process is small."""
    peaks = {}
    for contender in contenders:
        if not options.quick or contender.name in QUICK_PEAKS:
            peaks[contender.name] = peak(contender.name, options.quick)["steps"]
    rows = compare(contenders, work, options.repeats)
    for row in rows:
        for key, other in {"lora": "PEFT LoRA", "masked": "dense, masked"}.items():
            own = peaks.get(row["name"])
            row[f"peak_over_{key}"] = None if own is None else own / peaks[other]
    parameters = sum(parameter.numel() for parameter in work.base.parameters())
    facts = {"parameters": parameters, "tokens": work.tokens, "rank": work.rank, "keep": work.keep}
    return facts | {"repeats": options.repeats, "rows": rows}


def select(step: Step) -> None:
    """Take a step in which every layer chooses its support anew, from the step's own gradient."""
    from modular_experts.selection.choice import SupportChoice  # Lightning comes with these, which no step needs
    from modular_experts.selection.exchange import Exchange
    from modular_experts.selection.from_step import StepChoice

    layers: dict[str, Any] = dict(expert_layers(step.model))
    choice = StepChoice(SupportChoice(layers, position=100, lengths=(2000, 2000)))
    choice.next_part(is_last=True)

    def exchange() -> None:
        chosen, _ = choice.finish()
        assert step.optimizer is not None
        for name, units in chosen.items():
            Exchange().move(name, layers[name], units, [step.optimizer], graded=True)

    step(exchange)


def measure_selection(work: Work, contenders: list[Contender], options: argparse.Namespace) -> dict[str, Any]:
    """Return what a re-selection in every 100th step costs, in time and in memory beyond a step's."""
    rows = []
    for contender in contenders:
        space = peak(contender.name, options.quick, selection=True)
        step = Step(contender, work)
        calls: dict[str, Callable[[], None]] = {"step": step, "selection": partial(select, step)}
        seconds = race(calls, 3, WARM_UP, lambda _: step.rest())  # noqa: B023 - called within this round
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
        importlib.import_module("modular_experts.training")  # its memory is not the selection's
    step = Step(next(row for row in CONTENDERS if row.name == name), language_model(quick), alone=True)
    step()
    step()
    peaks = {"steps": high_water()}
    if selection:
        select(step)
        peaks["selection"] = high_water()
    return peaks


def parse() -> argparse.Namespace:
    """Return the options; without a part, both are measured."""
    parser = Parser(__doc__, quick="tiny sizes and two rounds, to see that it runs")
    for part in ("model", "selection"):
        parser.add_argument(f"--{part}", action="store_true", help="only this part")
    parser.add_argument("--repeats", type=int, default=5, help="rounds: 5")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats} must be at least 1")
    if not (options.model or options.selection or options.peak):
        options.model = options.selection = True
    options.repeats = min(options.repeats, 2) if options.quick else options.repeats
    return options


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the whole report."""
    reasons = {row.name: missing(row) for row in CONTENDERS}
    skipped = {name: reason for name, reason in reasons.items() if reason is not None}
    contenders = [row for row in CONTENDERS if row.name not in skipped]
    choosing = [row for row in contenders if row.name in (QUICK_CHOOSING if options.quick else CHOOSING)]
    work = language_model(options.quick)
    report: dict[str, Any] = {"skipped": skipped}
    if options.model:
        report["model"] = measure_model(work, contenders, options)
    if options.selection:
        report["selection"] = measure_selection(work, choosing, options)
    return report | {"goals": goals(report), "complete": True}


def goals(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each goal with the worst of its rows."""
    rows: dict[str, dict[str, Any]] = {}
    for part in ("model", "selection"):
        for row in report.get(part, {}).get("rows", []):
            rows[row["name"]] = rows.get(row["name"], {}) | row
    found = []
    for what, column, names, limit in GOALS:
        values = [rows[name][column] for name in names if rows.get(name, {}).get(column) is not None]
        found.append(goal(what, max(values, default=None), limit))
    return found


def show(report: dict[str, Any]) -> None:
    """Print the report for people."""
    print_machine(report)
    for name, reason in report["skipped"].items():
        print(f"left out: {name}: {reason}")
    if report["quick"]:
        print("A quick run, of sizes at which the numbers mean nothing.")
    if model := report.get("model"):
        head = (
            f"A training step of a Llama of {model['parameters'] / 1e6:.1f} M parameters, {model['tokens']} tokens, "
            f"{model['keep']:.1%} of seven projections trained; medians of {model['repeats']}"
        )
        columns = {"over_frozen": "/frozen", "over_lora": "/LoRA", "over_floor": "/floor"}
        columns |= {"shortest_over_frozen": "shortest", "spread": "spread"}
        columns |= {"peak_over_lora": "peak/LoRA", "peak_over_masked": "peak/masked", "kept": "kept"}
        columns |= {"optimizer_bytes": "optimizer bytes", "optimizer_bytes_per_kept": "per kept"}
        print_table(head, model["rows"], columns)
    if selection := report.get("selection"):
        columns = {"share_of_time": "share of time", "over_step": "/step", "extra_over_allowed": "memory/allowed"}
        head = "A re-selection in every 100th step; allowed is one layer and 1.3 x 8 bytes per kept entry"
        print_table(head, selection["rows"], columns)
    print_goals(report["goals"])


def main() -> None:
    options = parse()
    warnings.filterwarnings("ignore", module="peft|transformers")  # about hooks and sparse tensors of their own
    torch.set_num_threads(1)
    if options.peak:
        print(json.dumps(own_peak(options.peak, options.quick, options.selection)))
        return
    output(options, measure(options), show)


if __name__ == "__main__":
    main()
