"""Figures that others published stand beside ours, and never among them."""

import io

from rich.console import Console

from modular_experts.reports import Results
from modular_experts.study.summary import beside_published

THEIRS = {"lora TIES": {"held_in": 50.21, "held_out": 46.16}, "lora, single": {"held_in": 77.5}}
GIVEN = {"source": "arXiv 2507.07140", "metric": "rougeL", "rows": THEIRS}


def row(model: str, task: str, value: float, kind: str | None = "lora", merge: str | None = None, **more: bool) -> dict:
    role = "held_out" if task == "c" else "held_in"
    about = {"model": model, "experts": [], "kind": kind, "merge": merge, "task": task, "role": role}
    return {**about, "metric": "rougeL", "value": value, **more}


ROWS = [
    row("lora-a", "a", 0.9, own=True),
    row("lora-a", "b", 0.1, own=False),
    row("lora-b", "b", 0.7, own=True),
    row("lora TIES", "a", 0.5, merge="TIES", own=True),
    row("lora TIES", "b", 0.25, merge="TIES", own=True),
    row("lora TIES", "c", 0.125, merge="TIES", own=False),
]


def text(results: Results) -> str:
    console = Console(width=80, file=io.StringIO(), color_system=None)
    console.print(beside_published(results).text())
    return console.file.getvalue()


def test_their_figures_stand_beside_our_means_in_per_cent_as_they_published_them() -> None:
    shown = text(Results(ROWS, {"published": GIVEN})).splitlines()
    assert [line.split() for line in shown] == [
        ["held-in", "held-in", "held-out", "held-out"],
        ["Rouge-L", "%", "ours", "published", "ours", "published"],
        ["lora", "TIES", "37.5", "50.21", "12.5", "46.16"],
        # A single expert is judged by its own task alone.
        ["lora,", "single", "80.0", "77.50"],
    ]
