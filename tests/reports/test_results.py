"""Results are rows that anyone can read, and tables that any terminal and any notebook shows."""

import io
import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console

from modular_experts.reports import Results, write_json
from modular_experts.reports.results import unused

SCORES = {"loss": 0.2134, "exact_match": 0.85, "rougeL": 0.8851, "choice_accuracy": 0.5}


def scores(names: list[str], **changes: Any) -> dict[str, Any]:
    roles = ["held_in", "held_out"]
    return {
        "tasks": {
            name: {"role": roles[number % 2], "rows": 12345} | SCORES | changes for number, name in enumerate(names)
        }
    }


def shown(table: Any, width: int = 200) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(table)
    return stream.getvalue()


def test_scores_become_a_row_for_each_task_and_metric() -> None:
    results = Results.of_scores(scores(["a", "b"]), "merged", ["x", "y"], merge="TIES")
    assert len(results.rows) == 8
    assert results.rows[0] == {
        **{"model": "merged", "experts": ["x", "y"], "task": "a", "role": "held_in"},
        **{"metric": "loss", "value": 0.2134, "rows": 12345, "merge": "TIES"},
    }
    assert results.values("task") == ["a", "b"]
    assert results.values("nothing") == []


def test_rows_are_chosen_by_column_and_averaged_by_metric() -> None:
    results = Results(
        [
            {"model": "m", "task": task, "role": role, "metric": "loss", "value": value}
            for task, role, value in [("a", "held_in", 1.0), ("b", "held_in", 4.0), ("c", "held_out", None)]
        ]
    )
    assert results.mean("loss", role="held_in") == 2.5
    assert results.mean("loss", task="b") == 4.0
    assert math.isnan(results.mean("loss"))
    assert results.mean("exact_match") is None
    assert len(results.where(role="held_in", merge=None).rows) == 2
    assert len((results.where(role="held_in") + results.where(role="held_out")).rows) == 3


def test_who_leads_in_each_of_two_comparisons_leads_in_neither_of_their_sum() -> None:
    def compared(model: str, date: str) -> Results:
        known = {"model": model, "role": "held_in", "metric": "loss", "interval": [0.9, 1.1], "leads": True}
        row = known | {"task": "a", "value": 1.0}
        return Results([row, row | {"task": "b"}], {"date": date, "means": [known]})

    both = compared("one", "1") + compared("other", "2")
    for model in ("one", "other"):
        known = both.where(model=model).about("loss")
        assert (known["model"], known["interval"], known["leads"]) == (model, [0.9, 1.1], False)
        assert not any(row["leads"] for row in both.where(model=model).rows)
    part = compared("one", "1")
    assert (part.where(task="a") + part.where(task="b")).about("loss")["leads"]


@pytest.mark.parametrize("width", [80, 200])
def test_a_table_of_many_long_names_fits_80_columns_and_cuts_no_name(width: int) -> None:
    names = [f"{number:02d}" + "abcdefghij" * 6 + "kl" for number in range(40)]
    text = shown(Results.of_scores(scores(names)).table(), width)
    assert max(map(len, text.splitlines())) <= 80
    assert all(name[:22] in text for name in names)
    assert text.replace("\n", "").count("kl") >= 40
    assert all(cell in text for cell in ("12345", "0.213", "88.5"))
    assert "21.3" not in text


def test_several_models_have_a_line_each_in_terminal_and_notebook() -> None:
    one, other = scores(["a", "b", "c"], exact_match=0.5), scores(["a", "b", "c"], exact_match=0.75)
    both = Results.of_scores(one, "base") + Results.of_scores(other, "<merged>")
    lines = [line.split() for line in shown(both.table(), 80).splitlines()]
    assert lines[0][:3] == ["model", "role", "rows"]
    assert lines[1:3] == [
        ["base", "held-in", "24690", "0.213", "50.0", "88.5", "50.0"],
        ["<merged>", "held-in", "24690", "0.213", "75.0", "88.5", "50.0"],
    ]
    tree = ElementTree.fromstring(both._repr_html_())
    rows = [["".join(cell.itertext()) for cell in row] for row in tree.iter("tr")]
    assert rows[0] == ["model", "exact %", "role", "rows", "loss", "Rouge-L %", "choice %"]
    assert rows[4] == ["<merged>", "75.0", "held-out", "12345", "0.213", "88.5", "50.0"]


def test_numbers_that_are_not_finite_become_null_and_scalars_numbers(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    value = {"nan": float("nan"), "deep": [{"inf": torch.tensor(float("inf"))}], "three": torch.tensor(3), "ä": 1}
    write_json(path, value)
    assert json.loads(path.read_text("utf-8")) == {"nan": None, "deep": [{"inf": None}], "three": 3, "ä": 1}


def test_what_is_there_keeps_its_name(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    for name in ("results.json", "results-2.json", "results-3.json"):
        assert unused(path).name == name
        write_json(unused(path), {})
    (tmp_path / "results-2.json").unlink()
    assert unused(path).name == "results-2.json"


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    results = Results.of_scores(scores(["a", "b"]), "merged", ["x"]) + Results([], {"base": "b"})
    results.write(tmp_path / "results.json")
    assert Results.read(tmp_path / "results.json") == results
    for text in ("{", "[]", '{"format": "other"}'):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(ValueError, match=r"results\.json does not hold results of the format"):
            Results.read(tmp_path / "results.json")


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("values", "main"),
    [
        ({"exact_match": [0.0, 0.5], "number": [0.0, 0.0]}, "exact_match"),
        ({"exact_match": [0.0, 0.5], "number": [1.0, 0.0]}, "number"),
        ({"exact_match": [0.0, 0.0]}, "loss"),
        ({"exact_match": [0.5]}, "loss"),
    ],
)
def test_a_share_that_is_zero_everywhere_or_that_a_task_lacks_is_not_the_main_metric(values, main) -> None:
    given = values | {"loss": [1.0, 2.0]}
    rows = [
        {"task": task, "metric": metric, "value": value}
        for metric, several in given.items()
        for task, value in zip("ab", several, strict=False)
    ]
    assert Results(rows).main_metric == main
