"""A task is spelt in a configuration, checked at once, read from any source, and may take some rows of a table."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import write_rows
from test_sources import write

from modular_experts.data import Task, TaskMixture, TaskSource
from modular_experts.data.sources import path_records
from modular_experts.data.tasks import as_tasks, fill_splits


class Squares(TaskSource):
    """Squares of the first numbers.

    Args:
        size: How many.
    """

    def __init__(self, size: int = 3) -> None:
        self.size = size

    def rows(self) -> Iterator[dict[str, Any]]:
        for number in range(self.size):
            yield {"input": f"square of {number}", "target": str(number**2) if number != 7 else None}


def test_a_users_source_gives_rows_and_its_bad_rows_are_named() -> None:
    rows, problems = Task("squares", source=Squares(3)).read()
    assert [row.target for row in rows] == ["0", "1", "4"]
    assert problems == []
    assert Task("squares", source=Squares(9)).read()[1] == ["Squares:8: 'target' must be text, not None"]


def test_a_name_that_is_not_plain_is_refused() -> None:
    for name in ("../x", "a/b", "-a", "a b", "x" * 65, "a\n"):
        with pytest.raises(ValueError, match="cannot be the name of a task, which is up to 64"):
            Task(name, path="a.jsonl")
    with pytest.raises(ValueError, match=r"'a\.jsonl,b' cannot be .* or digit; separate files by spaces"):
        Task(path="a.jsonl,b.jsonl")


BAD = {
    "no place": ({"name": "a"}, "exactly one of `path`, `hub` and `source`"),
    "two places": ({"name": "a", "path": "a.jsonl", "hub": "b"}, "exactly one of `path`, `hub` and `source`"),
    "role": ({"name": "a", "path": "a.jsonl", "role": "heldout"}, "role 'heldout' is not one of .*mean held_out"),
    "columns": ({"name": "a", "path": "a.jsonl", "columns": {"inputs": "q"}}, "columns key 'inputs' .* mean input"),
    "where": ({"name": "a", "path": "a.jsonl", "where": {"k": ["x"]}}, r"where 'k' is one text or number, not \['x'\]"),
    "key": ({"name": "a", "paht": "a.jsonl"}, "a task has no 'paht'.* mean path"),
    "weight": ({"name": "a", "path": "a.jsonl", "weight": 0}, "weight=0 must be a positive number"),
    "cap": ({"name": "a", "path": "a.jsonl", "cap": 0}, "cap=0 must be at least 1"),
    "template": ({"name": "a", "path": "a.jsonl", "template": "{x"}, "malformed"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_task_gets_its_sentence(case: str) -> None:
    values, sentence = BAD[case]
    with pytest.raises(ValueError, match=sentence):
        as_tasks([values])


def test_no_tasks_and_a_name_given_twice_are_refused() -> None:
    with pytest.raises(ValueError, match="no tasks were given"):
        as_tasks([])
    with pytest.raises(ValueError, match=r"two tasks have the name 'a'.*: {name: a-2, path: b\.jsonl}$"):
        as_tasks([Task("a", path="a.jsonl"), {"name": "a", "path": "b.jsonl"}])
    glue = [{"hub": "nyu-mll/glue", "subset": subset} for subset in ("sst2", "mnli")]
    with pytest.raises(ValueError, match=r"so name one of them: {name: glue-2, hub: nyu-mll/glue, subset: mnli}$"):
        as_tasks(glue)
    with pytest.raises(ValueError, match=r"name the task: {name: mine, source: Squares}$"):
        Task(source=Squares())


def test_a_path_alone_is_a_task_of_the_files_name() -> None:
    tasks = as_tasks(["data/a.jsonl", Path("b.v2.csv"), {"path": "c.tsv", "role": "held_out"}, {"hub": "someone/d"}])
    named = {"a": "data/a.jsonl", "b.v2": "b.v2.csv", "c": "c.tsv", "d": None}
    assert [(task.name, task.path) for task in tasks] == [*named.items()]
    for alone in ("a.jsonl", Path("a.jsonl"), {"path": "a.jsonl"}, Task(path="a.jsonl")):
        assert as_tasks(alone) == [Task("a", path="a.jsonl")]


TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "t"}]
ALPACA = ["a: 'instruction' and 'input' are the input, 'output' is the target"]
CHAT = ["a: 'messages' is the conversation, and the assistant's turns are the target"]
FORMS = {
    "own": ({"input": "q", "target": "t"}, "q", []),
    "own beats all": ({"input": "q", "target": "t", "question": "x", "answer": "y", "prompt": "z"}, "q", []),
    "prompt": ({"prompt": "q", "completion": "t"}, "q", ["a: 'prompt' is the input, 'completion' is the target"]),
    "question": ({"question": "q", "answer": "t"}, "q", ["a: 'question' is the input, 'answer' is the target"]),
    "alpaca": ({"instruction": "q", "input": "i", "output": "t"}, "q\n\ni\n", ALPACA),
    "alpaca, empty input": ({"instruction": "q", "input": "", "output": "t"}, "q\n", ALPACA),
    "messages": ({"messages": TALK, "prompt": "x"}, "q", CHAT),
}


@pytest.mark.parametrize("case", FORMS)
def test_rows_are_recognised_by_their_columns(case: str, tmp_path: Path) -> None:
    values, text, lines = FORMS[case]
    said: list[str] = []
    task = Task(path=str(write_rows(tmp_path / "a.jsonl", [values, values])))
    rows, problems = task.read(report=said.append)
    assert [(row.input, row.target) for row in rows] == [(text, "t")] * 2
    assert (problems, said) == ([], lines)


def test_columns_and_template_beat_what_is_recognised(tmp_path: Path) -> None:
    path = str(write_rows(tmp_path / "a.jsonl", [{"question": "q", "answer": "t", "more": "m"}]))
    said: list[str] = []
    for settings, text in [
        ({"columns": {"input": "more", "target": "answer"}}, "m"),
        ({"columns": {"target": "answer"}, "template": "{question}!"}, "q!"),
        ({"columns": {"split": "fold"}}, "q"),
    ]:
        rows, problems = Task(path=path, **settings).read(report=said.append)  # type: ignore[arg-type]
        assert ([(row.input, row.target) for row in rows], problems) == ([(text, "t")], [])
    assert len(said) == 1
    talk = str(write_rows(tmp_path / "b.jsonl", [{"talk": TALK}]))
    assert Task(path=talk, columns={"messages": "talk"}).read()[0][0].messages == tuple(TALK)


def test_only_prediction_reads_rows_without_a_target(tmp_path: Path) -> None:
    for number, values in enumerate([{"input": "q"}, {"input": "q", "target": None}, {"messages": TALK[:1]}]):
        task = Task(path=str(write_rows(tmp_path / f"a{number}.jsonl", [values])))
        rows, problems = task.read(targets=False)
        assert ([(row.input, row.target) for row in rows], problems) == ([("q", None)], [])
        rows, problems = task.read()
        assert (rows, len(problems)) == ([], 1)
    assert fill_splits(task.read(targets=False)[0], 0.1, 0.1, 0, True)[0].split == "test"


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


@pytest.mark.parametrize(("suffix", "lines"), [(".jsonl", (3, 9, 15)), (".csv", (3, 6, 9)), ("", (2, 5, 8))])
def test_where_takes_the_same_rows_from_every_format_and_keeps_their_places(tmp_path, suffix, lines, capfd):
    path = write(tmp_path, suffix, ROWS)
    rows, problems = Task("b", path=path, columns=COLUMNS, where={"task": "b"}).read()
    assert [row.input for row in rows] == ["b0", "b1", "b2"]
    assert [row.where for row in rows] == [f"{path}:{line}" for line in lines]
    assert problems == []
    rows, _ = Task("b", path=path, columns=COLUMNS, where={"task": "b", "fold": 1}).read()
    assert [row.input for row in rows] == ["b1"]


def test_where_takes_rows_from_a_users_source_and_a_null_is_no_value(tmp_path: Path, capfd) -> None:
    taken, _ = Task("b", source=Table(), columns=COLUMNS, where={"fold": "1"}).read()
    assert [row.input for row in taken] == ["a1", "b1", "c1"]
    rows = [{"input": "a", "target": "b", "kind": None}, {"input": "c", "target": "d", "kind": "k"}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "d")
    for path in (write_rows(tmp_path / "d.jsonl", rows), tmp_path / "d"):
        assert [row.input for row in Task("k", path=str(path), where={"kind": "k"}).read()[0]] == ["c"]
        with pytest.raises(ValueError, match="'kind' is not 'None' but 'k'"):
            Task("k", path=str(path), where={"kind": "None"}).read()


def test_a_table_on_disk_is_not_read_row_by_row_to_find_a_task(tmp_path: Path, capfd) -> None:
    path = write(tmp_path, "", ROWS)
    assert [record.values["source"] for record in path_records(path, {"task": "b"})] == ["b0", "b1", "b2"]
    assert len(list(path_records(path, {"task": "d"}))) == 3  # one of each, to name what there is
    assert len(list(path_records(path, {"tsak": "b"}))) == 1


def test_tasks_of_one_hub_dataset_open_it_once(monkeypatch: pytest.MonkeyPatch, tiny_llama_dir: Path) -> None:
    opened = []

    def load_dataset(name: str, subset: str | None, revision: str | None) -> datasets.DatasetDict:
        opened.append((name, subset, revision))
        return datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    tasks = [{"name": one, "hub": "some/table-of-tasks", "columns": COLUMNS, "where": {"task": one}} for one in "abc"]
    mixture = TaskMixture(tasks, tokenizer=str(tiny_llama_dir), validation_ratio=0, test_ratio=0)
    mixture.setup("fit")
    assert mixture.counts == {"a": 3, "b": 3, "c": 3}
    assert opened == [("some/table-of-tasks", None, None)]
