"""Results are JSON that anyone can read, and a table that any terminal shows."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from modular_experts.evaluation import results_summary, results_table, write_results

SCORES = {"loss": 0.2134, "exact_match": 0.85, "rougeL": 0.8851, "choice_accuracy": 0.5}


def results(names: list[str]) -> dict[str, Any]:
    roles = ["held_in", "held_out"]
    tasks = {name: {"role": roles[number % 2], "rows": 12345} | SCORES for number, name in enumerate(names)}
    return {"tasks": tasks, "held_in": SCORES, "held_out": SCORES}


def shown(found: dict[str, Any], width: int = 200) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(results_table(found))
    return stream.getvalue()


@pytest.mark.parametrize("width", [80, 200])
def test_a_table_of_many_long_names_fits_80_columns_and_cuts_no_name(width: int) -> None:
    names = [f"{number:02d}" + "abcdefghij" * 6 + "kl" for number in range(40)]
    text = shown(results(names), width)
    assert max(map(len, text.splitlines())) <= 80
    letters = text.replace("\n", "")
    assert all(name[:22] in text for name in names)
    assert letters.count("kl") >= 40
    assert "12345" in text
    assert "21.3" not in text
    assert "0.213" in text
    assert "88.5" in text


def test_means_are_shown_per_role_and_missing_scores_as_a_dash() -> None:
    found = results(["a", "b"])
    found["tasks"]["a"] = {"role": "held_in", "rows": 3, "loss": float("nan")}
    found["held_in"] = {"loss": float("inf")}
    lines = [line.split() for line in shown(found).splitlines()]
    assert lines[1:3] == [["a", "held-in", "3", "-", "-", "-", "-"], ["mean", "held-in", "3", "-", "-", "-", "-"]]
    assert lines[3] == ["b", "held-out", "12345", "0.213", "85.0", "88.5", "50.0"]


def test_columns_that_nobody_measured_are_left_out() -> None:
    found = {"tasks": {"a": {"role": "held_in", "rows": 1, "loss": 2.0}}, "held_in": {"loss": 2.0}, "held_out": {}}
    assert shown(found).splitlines()[0].split() == ["task", "role", "rows", "loss"]


def test_the_summary_is_a_line_per_role() -> None:
    assert results_summary(results(["a", "b", "c"])).splitlines() == [
        "held-in (2 tasks): loss 0.213, exact % 85.0, Rouge-L % 88.5, choice % 50.0",
        "held-out (1 task): loss 0.213, exact % 85.0, Rouge-L % 88.5, choice % 50.0",
    ]


def test_numbers_that_are_none_become_null_and_scalars_numbers(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    write_results(
        path, {"nan": float("nan"), "deep": [{"inf": torch.tensor(float("inf"))}], "three": torch.tensor(3), "ä": 1}
    )
    assert json.loads(path.read_text("utf-8")) == {"nan": None, "deep": [{"inf": None}], "three": 3, "ä": 1}


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_results(path, {"a": 1})
    with pytest.raises(TypeError):
        write_results(path, {"a": object()})
    write_results(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]
