"""Print the estimate of a fit for `fit --dry-run`, in at most 80 columns."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from modular_experts.cli.format import counted, duration_text, share_text
from modular_experts.text import bytes_text
from modular_experts.training.estimate import FitEstimate


def print_estimate(found: FitEstimate) -> None:
    """Print the rows, what is trained, time and memory, and what would be written."""
    console = Console(markup=False, emoji=False, width=80)
    rows = _table("task", "split", "rows", "tokens", "truncated", left=2)
    for one in found.splits:
        held_out = " (held out)" if one.role == "held_out" else ""
        rows.add_row(one.task + held_out, one.split, f"{one.rows:,}", f"{one.tokens:,}", f"{one.truncated:,}")
    console.print(rows)
    weights = _table("weight", "weights", "entries", "trained", "share", left=1)
    for group in found.weights:
        share = share_text(group.trained / group.entries) if group.entries else ""
        weights.add_row(group.name, str(group.weights), f"{group.entries:,}", f"{group.trained:,}", share)
    console.print(weights)
    length, seconds = found.length, found.seconds
    trained, entries = (sum(getattr(one, name) for one in found.weights) for name in ("trained", "entries"))
    share = f", {share_text(trained / entries)} of these weights" if entries else ""
    print(f"{trained:,} trained parameters{share}")
    epochs = f"{length.total_steps / length.steps_per_epoch:.3g}"
    passes = f"{length.total_steps:,} steps ({epochs} epoch{'s' * (epochs != '1')})"
    rates = " and ".join(f"{rate:g}" for rate in found.rates)
    print(f"{passes} at learning rate {rates}; padding: {share_text(found.padding)} of the tokens")
    print("memory: about " + bytes_text(found.peak))
    for name, size in found.bytes.items():
        print(f"  {bytes_text(size):>8}  {name}")
    print("time: about " + duration_text(sum(seconds.values())))
    counts = {
        "router": "the router's tasks",
        "steps": f"{length.total_steps:,} steps",
        "choices": f"{counted(found.choices, 'choice')} of supports",
        "validations": counted(found.validations, "validation"),
    }
    for name, taken in seconds.items():
        if taken:
            print(f"  {duration_text(taken):>8}  {counts[name]}")
    print("a fit would write:")
    for content, place in found.places:
        print(f"  {place}: {content}" + f", {bytes_text(found.on_disk)}" * (content == "the expert"))
    if not any(content == "the expert" for content, _ in found.places):
        print("  no expert; --out library/NAME keeps one")
    print("time and memory are judged by a few steps of rate zero; nothing was written")


def _table(*names: str, left: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(names):
        justify: Any = "left" if number < left else "right"
        table.add_column(name, justify=justify, overflow="fold", no_wrap=number >= left)
    return table
