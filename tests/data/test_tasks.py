"""A task is spelt in a configuration, checked at once, and read from wherever it says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import write_rows

from modular_experts.data import Task, TaskSource
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
        with pytest.raises(ValueError, match="a task name is up to 64"):
            Task(name, path="a.jsonl")


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
    with pytest.raises(ValueError, match="two tasks have the name 'a'"):
        as_tasks([Task("a", path="a.jsonl"), {"name": "a", "path": "b.jsonl"}])


def test_a_path_alone_is_a_task_of_the_files_name() -> None:
    tasks = as_tasks(["data/a.jsonl", Path("b.v2.csv"), {"path": "c.tsv", "role": "held_out"}, {"hub": "someone/d"}])
    assert [(task.name, task.path) for task in tasks] == [
        ("a", "data/a.jsonl"),
        ("b.v2", "b.v2.csv"),
        ("c", "c.tsv"),
        ("d", None),
    ]
    for alone in ("a.jsonl", Path("a.jsonl"), {"path": "a.jsonl"}, Task(path="a.jsonl")):
        assert as_tasks(alone) == [Task("a", path="a.jsonl")]


TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "t"}]
FORMS = {
    "own": ({"input": "q", "target": "t"}, "q", []),
    "own beats all": ({"input": "q", "target": "t", "question": "x", "answer": "y", "prompt": "z"}, "q", []),
    "prompt": ({"prompt": "q", "completion": "t"}, "q", ["a: 'prompt' is the input, 'completion' is the target"]),
    "question": ({"question": "q", "answer": "t"}, "q", ["a: 'question' is the input, 'answer' is the target"]),
    "alpaca": (
        {"instruction": "q", "input": "i", "output": "t"},
        "q\n\ni\n",
        ["a: 'instruction' and 'input' are the input, 'output' is the target"],
    ),
    "alpaca, empty input": (
        {"instruction": "q", "input": "", "output": "t"},
        "q\n",
        ["a: 'instruction' and 'input' are the input, 'output' is the target"],
    ),
    "messages": (
        {"messages": TALK, "prompt": "x"},
        "q",
        ["a: 'messages' is the conversation, and the assistant's turns are the target"],
    ),
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
