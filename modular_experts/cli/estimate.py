"""Print what `fit --dry-run` estimates: rows, trained numbers, time and memory, and the files to be written."""

from rich.console import Console
from rich.table import Table

from modular_experts.cli.format import counted, duration_text, share_text, table_of
from modular_experts.study.options import SHORT_NAMES
from modular_experts.text import bytes_text
from modular_experts.training.estimate import FitEstimate


def print_estimate(estimated: FitEstimate, limit: str | None) -> None:
    """Print an estimate in at most 80 columns; `limit` is the memory that the fit shall fit into."""
    console = Console(markup=False, emoji=False, width=80)
    console.print(_rows(estimated))
    console.print(_weights(estimated))
    _print_training(estimated)
    print("memory: about " + bytes_text(estimated.peak))
    for name, size in estimated.bytes.items():
        print(f"  {bytes_text(size):>8}  {name}")
    if estimated.seconds:
        _print_times(estimated)
    print("a fit would write:")
    for content, place in estimated.places:
        is_measured = content == "the expert" and not estimated.predicted
        size_text = f", {bytes_text(estimated.on_disk)}" if is_measured else ""
        print(f"  {place}: {content}{size_text}")
    if not any(content == "the expert" for content, _ in estimated.places):
        print("  no expert; --out library/NAME keeps one")
    if limit:
        print(f"to fit into {limit}, add these options:" if estimated.changes else f"it fits into {limit} as it is")
    short = {full: name for name, full in SHORT_NAMES.items()}
    for change in estimated.changes:
        options = [f"--{short.get(name, name)} {str(value).lower()}" for name, value in change.settings.items()]
        print(f"  {bytes_text(change.peak):>8}  with {' '.join(options)}")
    if estimated.predicted:
        print("predicted from shapes alone, without times; nothing was written")
    else:
        print("estimated from a few steps at a learning rate of 0; nothing was written")


def _rows(estimated: FitEstimate) -> Table:
    table = table_of("task", "split", "rows", "tokens", "truncated", left=2)
    for split in estimated.splits:
        task = f"{split.task} (held out)" if split.role == "held_out" else split.task
        table.add_row(task, split.split, f"{split.rows:,}", f"{split.tokens:,}", f"{split.truncated:,}")
    return table


def _weights(estimated: FitEstimate) -> Table:
    table = table_of("weight", "weights", "entries", "trained", "share", left=1)
    for group in estimated.weights:
        share = share_text(group.trained / group.entries) if group.entries else ""
        name = group.name.removesuffix(".weight")
        table.add_row(name, str(group.weights), f"{group.entries:,}", f"{group.trained:,}", share)
    return table


def _print_training(estimated: FitEstimate) -> None:
    trained = sum(group.trained for group in estimated.weights)
    entries = sum(group.entries for group in estimated.weights)
    share = f", {share_text(trained / entries)} of these weights" if entries else ""
    print(f"{trained:,} trained parameters{share}")
    length = estimated.length
    epochs = f"{length.total_steps / length.steps_per_epoch:.3g}"
    unit = "epoch" if epochs == "1" else "epochs"
    rates = " and ".join(f"{rate:g}" for rate in estimated.rates)
    steps = f"{length.total_steps:,} steps ({epochs} {unit}) at learning rate {rates}"
    print(f"{steps}; padding: {share_text(estimated.padding)} of the tokens")


def _print_times(estimated: FitEstimate) -> None:
    print("time: about " + duration_text(sum(estimated.seconds.values())))
    counts = {
        "router": "the router's tasks",
        "steps": f"{estimated.length.total_steps:,} steps",
        "choices": f"{counted(estimated.choices, 'choice')} of supports",
        "validations": counted(estimated.validations, "validation"),
    }
    for name, seconds in estimated.seconds.items():
        if seconds:
            print(f"  {duration_text(seconds):>8}  {counts[name]}")
