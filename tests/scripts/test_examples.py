"""The shipped task files equal their script's output, are sound, and hard to answer by luck."""

import datetime
import json
from collections import Counter
from pathlib import Path

import examples
import pytest
from testbed.documents import ROOT

from modular_experts.data import Task

FILES = sorted((ROOT / "examples").glob("*.jsonl"))


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / f"examples/{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_script_makes_what_is_shipped(tmp_path: Path) -> None:
    examples.write(tmp_path)
    made = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert made == {file.name: file.read_bytes() for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_row_is_good_and_no_input_comes_twice(file: Path) -> None:
    found, problems = Task(file.stem, path=str(file)).read()
    assert not problems
    assert Counter(row.split for row in found) == examples.SPLITS
    assert len({row.input for row in found}) == len(found)
    assert max(Counter(row.target for row in found if row.split == "test").values()) < 20  # of 40: no answer is a guess


def test_dates_are_the_days_that_their_words_name() -> None:
    for row in rows("dates"):
        day = datetime.date.fromisoformat(row["target"])
        words = row["input"].replace(",", "").split()
        assert str(day.year) in words
        assert any(word in (f"{day:%B}", f"{day:%b}") for word in words)
        assert any(word.rstrip("sthndr") == str(day.day) for word in words)


def test_past_shares_no_answer_with_the_tasks_that_experts_are_trained_on() -> None:
    trained = {row["target"] for name in ("dates", "mood", "plural") for row in rows(name)}
    assert not trained & {row["target"] for row in rows("past")}
