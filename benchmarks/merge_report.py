"""What `merge_speed.py` and `merge_scale.py` make of their measurements: the goals, met or missed, the tables, and on
which machine.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import measuring
from rich.console import Console
from rich.table import Table

__all__ = ["goals", "machine", "print_table", "show"]

CPU_GOALS = {"linear": 6.0, "task_arithmetic": 10.0, "ties": 15.0, "dare_ties": 12.0, "breadcrumbs": 10.0}
PEAK_GOALS = dict.fromkeys(CPU_GOALS, 6.0)
GROWTH_GOAL, FLOOR_GOAL, CHECKPOINTS_GOAL = 1.1, 2.0, 3.0
COLUMNS = {"cpu": "CPU", "wall": "wall", "peak": "peak", "anonymous": "anonymous"}
AGREEMENT = {"unequal": "unequal", "unequal_of_moved": "of moved"}


def machine() -> dict[str, str]:
    """Return what a reader must know of the machine, and how busy it is: 1 means that each core has one to serve."""
    busy = os.getloadavg()[0] / (os.cpu_count() or 1)
    found = {name: value for name, value in measuring.machine().items() if name != "peft"}
    return found | {"load per core": f"{busy:.1f}"}


def goals(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return each goal with what was measured at the most experts, and whether it was met."""
    most = max((row["experts"] for row in report["merges"]), default=0)
    rows = {row["method"]: row for row in report["merges"] if row["experts"] == most}
    of_checkpoints = {row["method"]: row for row in report["checkpoints"]}
    found = []
    for name in CPU_GOALS:
        row = rows.get(name, {})
        found.append(_at_least(f"{name}: CPU of mergekit over ours", row.get("cpu"), CPU_GOALS[name]))
        found.append(_at_least(f"{name}: peak memory of mergekit over ours", row.get("peak"), PEAK_GOALS[name]))
    for row in report["growth"]:
        what = f"{row['method']}: anonymous memory of ours, {row['experts'][1]} experts over {row['experts'][0]}"
        found.append(_at_most(what, row["anonymous"], GROWTH_GOAL))
    for row in report["floor"]:
        what = f"{row['method']}: CPU of ours over reading, hashing and writing"
        found.append(_at_most(what, row["over_hashed"]["cpu"], FLOOR_GOAL))
    for name in ("linear", "ties"):
        what = f"{name}, full checkpoints: CPU of mergekit over ours"
        found.append(_at_least(what, of_checkpoints.get(name, {}).get("cpu"), CHECKPOINTS_GOAL))
    return found


def _at_least(goal: str, measured: float | None, limit: float) -> dict[str, Any]:
    met = None if measured is None else measured >= limit
    return {"goal": goal, "measured": measured, "limit": limit, "sense": "at least", "met": met}


def _at_most(goal: str, measured: float | None, limit: float) -> dict[str, Any]:
    met = None if measured is None else measured <= limit
    return {"goal": goal, "measured": measured, "limit": limit, "sense": "at most", "met": met}


def show(report: Mapping[str, Any]) -> None:
    """Print the report of `merge_speed.py`."""
    console = Console(width=140)
    console.print(", ".join(f"{key} {value}" for key, value in report["machine"].items()), highlight=False)
    if report["tiny"]:
        console.print("A tiny base, at which the numbers mean nothing.")
    of_both = "mergekit / ours, medians of {}; spread: range of CPU seconds over their median".format(report["repeats"])
    titles = {"experts": "experts"} | COLUMNS | {"spread": "spread"} | AGREEMENT
    if any("cpu" in row for row in report["merges"]):
        print_table(console, f"Sparse experts to a checkpoint: {of_both}", report["merges"], titles)
    if report["checkpoints"]:
        print_table(console, f"From full checkpoints on both sides: {of_both}", report["checkpoints"], titles)
    if report["growth"]:
        span = "{1} experts over {0}".format(*report["growth"][0]["experts"])
        beyond = COLUMNS | {"anonymous_beyond": "beyond imports"}
        print_table(console, f"Ours: {span}", report["growth"], beyond)
    for row in report["floor"]:
        kinds = {"over_hashed": "/ read, hash, write", "over_read": "/ read, write", "checked_over_plain": "checked /"}
        rows = [{"method": f"ours {title}", **row[kind]} for kind, title in kinds.items()]
        print_table(
            console, f"{row['method']}, {row['experts']} experts: ours over the floor, and the check", rows, COLUMNS
        )
    _show_goals(console, report["goals"])
    console.print("Wall clock and spread tell how busy the machine was; compare CPU and memory. The table is complete.")


def print_table(console: Console, title: str, rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """Print a table of each row's name, which is its first value, and some of its numbers."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for heading in columns.values():
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(next(iter(row.values())), *(cell(row.get(key)) for key in columns))
    console.print(table)


def cell(value: float | int | None) -> str:
    """Return a number as a table shows it; small shares keep two digits."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.2g}" if 0 < abs(value) < 0.01 else f"{value:.2f}"


def _show_goals(console: Console, found: Iterable[Mapping[str, Any]]) -> None:
    verdicts: Callable[[Any], str] = {True: "met", False: "missed", None: "not measured"}.__getitem__
    table = Table(title="Goals", title_justify="left")
    for heading in ("", "measured", "limit", ""):
        table.add_column(heading)
    for goal in found:
        limit = f"{goal['sense']} {goal['limit']:g}"
        table.add_row(goal["goal"], cell(goal["measured"]), limit, verdicts(goal["met"]))
    console.print(table)
