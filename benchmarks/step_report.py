"""What `sparse_step.py` makes of its measurements: the goals, met or missed, and the tables."""

from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["goals", "text"]

FORMS = {
    "entries": ["entries, sampled", "entries, native"],
    "tiles": ["tiles of 16, block_rows", "tiles of 16, native", "tiles of 64, block_rows", "tiles of 64, native"],
    "rows": ["rows, slices"],
    "columns": ["columns, slices"],
}
"""Rows of the table by form. The dense backend of entries is left out: it is for when more is kept."""

TIMES = {"over_frozen": "/frozen", "over_lora": "/LoRA", "over_floor": "/floor"}
TIMES |= {"shortest_over_frozen": "shortest", "spread": "spread"}
EVERY = [name for names in FORMS.values() for name in names]


def goals(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each goal with what was measured (the worst, where it is for several rows) and whether it was met."""
    rows = {row["name"]: row for row in report.get("model", {}).get("rows", [])}
    chosen = report.get("selection", {}).get("rows", [])

    def worst(column: str, names: Iterable[str]) -> float | None:
        values = [rows[name][column] for name in names if rows.get(name, {}).get(column) is not None]
        return max(values, default=None)

    found = _goals_of_time(worst) + _goals_of_memory(worst)
    share = max((row["share_of_time"] for row in chosen), default=None)
    space = max((row["extra_over_allowed"] for row in chosen), default=None)
    found.append(("re-selection every 100 steps: share of the time", share, 0.02))
    found.append(("re-selection: memory beyond a step's, over one layer and 1.3 k", space, 1.0))
    return [
        {"goal": goal, "measured": value, "limit": limit, "met": None if value is None else value <= limit}
        for goal, value, limit in found
    ]


def _goals_of_time(worst: Callable[[str, Iterable[str]], float | None]) -> list[tuple[str, float | None, float]]:
    slices = ["rows, slices", "columns, slices"]
    return [
        ("tiles of 16, PyTorch only: time over PEFT LoRA's", worst("over_lora", ["tiles of 16, block_rows"]), 1.0),
        ("tiles of 16, native: time over PEFT LoRA's", worst("over_lora", ["tiles of 16, native"]), 0.95),
        ("rows and columns: time over PEFT LoRA's", worst("over_lora", slices), 0.94),
        ("rows and columns: time over frozen", worst("over_frozen", slices), 1.05),
        ("entries, PyTorch only: time over PEFT SHiRA's", worst("over_shira", ["entries, sampled"]), 0.8),
        ("entries, native: time over PEFT SHiRA's", worst("over_shira", ["entries, native"]), 0.8),
        ("entries, native: time over PEFT LoRA's", worst("over_lora", ["entries, native"]), 1.0),
        ("every form: time over dense and masked", worst("over_masked", EVERY), 0.55),
    ]


def _goals_of_memory(worst: Callable[[str, Iterable[str]], float | None]) -> list[tuple[str, float | None, float]]:
    return [
        *((f"{form}: peak memory over PEFT LoRA's", worst("peak_over_lora", FORMS[form]), 1.0) for form in FORMS),
        ("columns: peak memory over PEFT LoRA's, tighter", worst("peak_over_lora", FORMS["columns"]), 0.9),
        ("every form: peak memory over dense and masked", worst("peak_over_masked", EVERY), 0.5),
        ("every form: bytes of AdamW's moments per kept entry", worst("moment_bytes_per_kept", EVERY), 8.0),
    ]


def text(report: dict[str, Any]) -> str:
    """Return the report for people."""
    lines = [", ".join(f"{key} {value}" for key, value in report["machine"].items())]
    lines += [f"left out: {name}: {reason}" for name, reason in report["skipped"].items()]
    if report["quick"]:
        lines.append("A quick run, of sizes at which the numbers mean nothing.")
    lines += _model(report["model"]) if "model" in report else []
    for layer in report.get("layers", []):
        lines += _layer(layer)
    lines += _selection(report["selection"]) if "selection" in report else []
    lines += ["", "goal: measured, limit", *map(_goal, report["goals"])]
    return "\n".join([*lines, "", "The table is complete."])


def _model(model: dict[str, Any]) -> list[str]:
    head = (
        f"A training step of a Llama of {model['parameters'] / 1e6:.1f} M parameters, {model['tokens']} tokens, "
        f"{model['keep']:.1%} of seven projections trained; medians of {model['repeats']}"
    )
    columns = TIMES | {"peak_over_lora": "peak/LoRA", "peak_over_masked": "peak/masked", "kept": "kept"}
    columns |= {"optimizer_bytes": "optimizer bytes", "optimizer_bytes_per_kept": "per kept"}
    return ["", head, *_table(model["rows"], columns)]


def _layer(layer: dict[str, Any]) -> list[str]:
    rows, inputs = layer["shape"]
    head = f"{rows} x {inputs}, {layer['tokens']} tokens, {layer['keep']:.2%} trained; medians of {layer['repeats']}"
    return ["", head, *_table(layer["rows"], TIMES | {"kept": "kept", "kept_over_lora": "kept/LoRA"})]


def _selection(selection: dict[str, Any]) -> list[str]:
    columns = {"share_of_time": "share of time", "over_step": "/step", "extra_over_allowed": "memory/allowed"}
    head = "A re-selection in every 100th step; allowed is one layer and 1.3 x 8 bytes per kept entry"
    return ["", head, *_table(selection["rows"], columns)]


def _table(rows: list[dict[str, Any]], columns: dict[str, str]) -> list[str]:
    width = max(len(row["name"]) for row in rows)
    sizes = {key: max(len(title), *(len(_cell(row[key])) for row in rows)) for key, title in columns.items()}
    lines = [" " * width + "".join(f"{title:>{sizes[key] + 2}}" for key, title in columns.items())]
    for row in rows:
        lines.append(f"{row['name']:<{width}}" + "".join(f"{_cell(row[key]):>{sizes[key] + 2}}" for key in columns))
    return lines


def _cell(value: float | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def _goal(goal: dict[str, Any]) -> str:
    verdict = {True: "met", False: "missed", None: "not measured"}[goal["met"]]
    return f"{goal['goal']}: {_cell(goal['measured'])}, at most {goal['limit']:g}: {verdict}"
