"""The shipped task files equal their script's output, are sound, and hard to answer by luck."""

from collections import Counter
from pathlib import Path

import examples
import pytest
from testbed.documents import ROOT

from modular_experts.data import Task

FILES = sorted((ROOT / "examples").glob("*.jsonl"))


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
