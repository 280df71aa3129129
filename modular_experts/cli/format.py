"""Write experts, settings and numbers in few characters."""

import webbrowser
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from modular_experts.base.verify import Check
from modular_experts.library import StoredExpert
from modular_experts.library.record import MERGE, ROUTED
from modular_experts.library.statistics import StoredStatistics
from modular_experts.text import bytes_text


def expert_line(expert: StoredExpert) -> str:
    """Return an expert in one line."""
    size = bytes_text(expert.size_on_disk)
    if expert.is_routed:
        return f"{kind_text(expert.record)}, {counted(len(expert.record['parents']), 'expert')}, {size}"
    return (
        f"{expert.record['kind']}, {len(expert)} weights, {share_text(expert.kept_share)} of their entries kept, {size}"
    )


def statistics_text(stored: StoredStatistics) -> str:
    """Return stored statistics in one line."""
    rows = ", ".join(f"{count} rows of {task}" for task, count in sorted(stored.facts["tasks"].items()))
    return f"{len(stored)} weights on {rows}, {bytes_text(stored.size_on_disk)}"


def duration_text(seconds: float) -> str:
    """Return a time such as `12 s`, `3 min` or `1.5 h`."""
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def kind_text(record: Mapping[str, Any]) -> str:
    """Return the kind of an expert, of a merge also its method, and of a routed expert its router."""
    if record["kind"] == ROUTED:
        return f"routed: {(record.get('hyperparameters') or {}).get('router')}"
    if record["kind"] != MERGE:
        return record["kind"]
    method = record.get("method")
    return f"merge: {method['class_path'].rpartition('.')[2] if method else 'by pattern'}"


def call_text(name: str, settings: Mapping[str, Any]) -> str:
    """Return a class and its settings, such as `TIES(keep=0.2, scope='weight')`; None is left out."""
    shown = [f"{key}={value_text(value)}" for key, value in settings.items() if value is not None]
    return f"{name}({', '.join(shown)})" if shown else name


def value_text(value: Any) -> str:
    """Return a setting: numbers to four digits, strings in quotes, a described method as a call, long lists cut."""
    if isinstance(value, list) and len(value) > 8:
        return f"[{', '.join(map(value_text, value[:4]))}, ..., {len(value)} in all]"
    if isinstance(value, dict) and "class_path" in value:
        return call_text(value["class_path"].rpartition(".")[2], value["init_args"])
    if isinstance(value, float):
        return str(float(f"{value:.4g}"))
    return f"'{value}'" if isinstance(value, str) else str(value)


def table_of(*columns: str, left: int = 1) -> Table:
    """Return an empty table: the first `left` columns hold text, which may wrap, and the others numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(columns):
        is_text = number < left
        table.add_column(name, justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold")
    return table


def counted(number: int, thing: str) -> str:
    """Return a number of things, such as `1 expert` or `2 experts`."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def share_text(share: float) -> str:
    """Return a share in per cent, such as `5 %` or `0.013 %`."""
    return f"{100 * share:.3g} %"


def print_check(found: Check | None) -> None:
    """Print how a checkpoint compared with the model in memory, and the effect of rounding."""
    if found is None:
        print("not loaded again, because check is false")
        return
    largest = f"{found.largest_difference:.3g} (tolerance {found.tolerance:g})"
    print(f"loaded again with transformers: the largest difference of a logit is {largest}")
    rounding = found.rounding
    if rounding.lost > 0:
        lost = share_text(rounding.lost)
        kept = share_text(rounding.unchanged / rounding.moved)
        print(f"rounding took {lost} of the deltas' length, and kept {kept} of the moved entries as in the base")


def open_page(file: Path) -> None:
    """Show a page in the browser, or print that there is none."""
    if not webbrowser.open(file.absolute().as_uri()):
        print(f"no browser was found; copy {file} to a machine that has one, for it needs no other file")
