"""Results: scores written as JSON, and shown as a table or in two lines.

What a score means is said in `scores.py`. Numbers that are none (NaN, infinity) are written as null, because JSON has
no others.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

__all__ = ["results_summary", "results_table", "write_results"]

_COLUMNS = {"loss": "loss", "exact_match": "exact %", "rougeL": "Rouge-L %", "choice_accuracy": "choice %"}
_ROLES = {"held_in": "held-in", "held_out": "held-out"}
_NAME_WIDTH = 25  # with all other columns the table is 80 wide at most; longer names are folded, not cut


def write_results(path: str | Path, results: Mapping[str, Any]) -> None:
    """Write results as indented JSON; a reader sees the whole file or the one before it."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_plain(results), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", text=True)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide the results from a group
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def results_table(results: Mapping[str, Any]) -> Table:
    """Return a table at most 80 columns wide: a line per task, and the means of each role."""
    tasks = results["tasks"]
    shown = [name for name in _COLUMNS if any(name in scores for scores in tasks.values())]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("task", max_width=_NAME_WIDTH, overflow="fold")
    table.add_column("role", no_wrap=True)
    table.add_column("rows", justify="right", no_wrap=True)
    for name in shown:
        table.add_column(_COLUMNS[name], justify="right", no_wrap=True)
    for role, word in _ROLES.items():
        members = {name: scores for name, scores in tasks.items() if scores["role"] == role}
        for name, scores in members.items():
            table.add_row(escape(name), word, str(scores["rows"]), *(_cell(scores, column) for column in shown))
        if members:
            rows = str(sum(scores["rows"] for scores in members.values()))
            means = [_cell(results.get(role, {}), column) for column in shown]
            table.add_row("mean", word, rows, *means, style="bold", end_section=True)
    return table


def results_summary(results: Mapping[str, Any]) -> str:
    """Return one line for each role that has tasks: "held-in (4 tasks): loss 0.213, exact % 85.0, Rouge-L % 88.5"."""
    lines = []
    for role, word in _ROLES.items():
        count = sum(scores["role"] == role for scores in results["tasks"].values())
        if count:
            scores = results.get(role, {})
            cells = ", ".join(f"{title} {_cell(scores, name)}" for name, title in _COLUMNS.items() if name in scores)
            lines.append(f"{word} ({count} task{'s' * (count > 1)}): {cells}")
    return "\n".join(lines)


def _cell(scores: Mapping[str, Any], name: str) -> str:
    value = scores.get(name)
    if value is None or not math.isfinite(value):
        return "-"
    if name == "loss":
        return f"{value:.3f}" if value < 1e4 else f"{value:.1e}"
    return f"{100 * value:.1f}"


def _plain(value: Any) -> Any:
    """Return the value as JSON knows it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if hasattr(value, "item"):  # a tensor or numpy scalar
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
