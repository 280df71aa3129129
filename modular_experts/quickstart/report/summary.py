"""Summary: a run for the terminal, as a table at most 80 columns wide and a few sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from modular_experts.quickstart.report.findings import (
    about_certainty,
    about_held_out,
    about_merging,
    about_methods,
    about_singles,
)
from modular_experts.quickstart.report.reading import (
    KIND_NAMES,
    METHOD_NAMES,
    Reading,
    number,
    percent,
    share,
    size,
    times,
)

__all__ = ["summary_sentences", "summary_table"]

COLUMNS = ("held-in", "held-out", "kept", "touched", "size", "seconds")


def summary_table(results: Mapping[str, Any]) -> Table:
    """Return a table at most 80 columns wide: base and multitask, then per kind the experts and the merges of all.

    Args:
        results: What `results.json` of a complete run holds.
    """
    reading = Reading(results)
    table = Table(
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        title=f"Exact match (%) of {len(reading.tasks())} experts, and of their merges at the chosen scale",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("")
    for name in COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for row in (*_marks(reading), *_kinds(reading)):
        table.add_row(*row)
    return table


def summary_sentences(results: Mapping[str, Any]) -> list[str]:
    """Return the main findings, one sentence or two a line.

    Args:
        results: What `results.json` of a complete run holds.
    """
    reading = Reading(results)
    first = reading.kinds[0]
    return [
        about_singles(reading),
        about_merging(reading, first),
        about_methods(reading, first),
        about_held_out(reading, first),
        about_certainty(reading),
    ]


def _marks(reading: Reading) -> list[tuple[str, ...]]:
    base, multitask = reading.results["base"], reading.results["multitask"]
    cost = share(multitask["kept"]), share(multitask["ever_trained"]), size(multitask["bytes"])
    return [
        ("base", *_both(base["plain"]), "", "", "", number(base["seconds"], 1)),
        ("base, own format", *_both(base["latent"])),
        ("multitask", *_both(multitask), *cost, number(multitask["seconds"], 1)),
    ]


def _kinds(reading: Reading) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for kind in reading.kinds:
        shares = share(reading.single(kind, "kept")), share(reading.single(kind, "ever_trained"))
        cost = *shares, size(reading.single(kind, "bytes")), number(reading.single(kind, "seconds"), 1)
        rows += [(), (f"[bold]{KIND_NAMES[kind]}[/bold], single", percent(reading.single(kind)), "", *cost)]
        rows += [_merge(reading, kind, method) for method in reading.methods(kind)]
    return rows


def _merge(reading: Reading, kind: str, method: str) -> tuple[str, ...]:
    merge = reading.merge(kind, method)
    name = f"  {METHOD_NAMES[method]} {times(merge['scale'])}"
    return name, *_both(merge["chosen"]), share(merge["kept"]), "", size(merge["bytes"]), number(merge["seconds"], 1)


def _both(scores: Mapping[str, Any]) -> tuple[str, str]:
    return percent(scores["held_in"]["exact_match"]), percent(scores["held_out"]["exact_match"])
