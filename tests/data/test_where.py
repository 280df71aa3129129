"""One table of many tasks: `where` takes a task's rows from any source, and says what there is where it finds none."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import write_rows

from modular_experts.data import Task, TaskMixture, TaskSource
from modular_experts.data.sources import path_records

#: Rows 2, 5 and 8 are of the task "b".
ROWS = [
    {"source": f"{task}{number}", "target": "t", "task": task, "fold": number % 2, "split": "train"}
    for number in range(3)
    for task in "abc"
]
COLUMNS = {"input": "source"}


class Table(TaskSource):
    """The rows, from a class."""

    def rows(self) -> Iterator[dict[str, Any]]:
        yield from ROWS


def table(folder: Path, suffix: str) -> str:
    """Write the rows in one format, and return where."""
    path = folder / f"table{suffix}"
    if suffix == ".jsonl":
        write_rows(path, ROWS)
    elif suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(ROWS[0]))
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        datasets.Dataset.from_list(ROWS).save_to_disk(path)
    return str(path)


@pytest.mark.parametrize(("suffix", "before"), [(".jsonl", 0), (".csv", 1), ("", 0)], ids=lambda value: value)
def test_where_takes_the_same_rows_from_every_format_and_keeps_their_places(
    tmp_path: Path, suffix: str, before: int, capfd
) -> None:
    path = table(tmp_path, suffix)
    rows, problems = Task("b", path=path, columns=COLUMNS, where={"task": "b"}).read()
    assert [row.input for row in rows] == ["b0", "b1", "b2"]
    assert [row.where for row in rows] == [f"{path}:{line + before}" for line in (2, 5, 8)]
    assert problems == []
    rows, _ = Task("b", path=path, columns=COLUMNS, where={"task": "b", "fold": 1}).read()
    assert [row.input for row in rows] == ["b1"]


def test_where_takes_rows_from_a_users_source() -> None:
    rows, _ = Task("b", source=Table(), columns=COLUMNS, where={"fold": "1"}).read()
    assert [row.input for row in rows] == ["a1", "b1", "c1"]


def test_a_null_is_no_value(tmp_path: Path, capfd) -> None:
    rows = [{"input": "a", "target": "b", "kind": None}, {"input": "c", "target": "d", "kind": "k"}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "d")
    for path in (write_rows(tmp_path / "d.jsonl", rows), tmp_path / "d"):
        assert [row.input for row in Task("k", path=str(path), where={"kind": "k"}).read()[0]] == ["c"]
        with pytest.raises(ValueError, match="'kind' is not 'None' but 'k'"):
            Task("k", path=str(path), where={"kind": "None"}).read()


def test_a_table_on_disk_is_not_read_row_by_row_to_find_a_task(tmp_path: Path, capfd) -> None:
    path = table(tmp_path, "")
    assert [record.values["source"] for record in path_records(path, {"task": "b"})] == ["b0", "b1", "b2"]
    assert len(list(path_records(path, {"task": "d"}))) == 3  # one of each, to name what there is
    assert len(list(path_records(path, {"tsak": "b"}))) == 1


def test_tasks_of_one_hub_dataset_open_it_once(monkeypatch: pytest.MonkeyPatch, tiny_llama_dir: Path) -> None:
    opened = []

    def load_dataset(name: str, subset: str | None, revision: str | None) -> datasets.DatasetDict:
        opened.append((name, subset, revision))
        return datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    tasks = [
        {"name": name, "hub": "some/table-of-tasks", "columns": COLUMNS, "where": {"task": name}} for name in "abc"
    ]
    mixture = TaskMixture(tasks, tokenizer=str(tiny_llama_dir), validation_ratio=0, test_ratio=0)
    mixture.prepare_data()
    mixture.setup("fit")
    assert mixture.counts == {"a": 3, "b": 3, "c": 3}
    assert opened == [("some/table-of-tasks", None, None)]
