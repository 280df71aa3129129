"""Run a few cases of the quickest families in every run of the tests; `make soak` draws others."""

from pathlib import Path

import pytest

from soak.case import Case, end_of
from soak.families import all_families

CASES = {"by-token": 2, "cut": 5, "distill": 3, "export": 3, "file": 4, "hub": 2, "recipe": 11}
CASES |= {"remove": 4, "search": 3, "shrink": 4, "statistics": 8, "tune": 3}
"""How many cases of a family."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", CASES)
def test_a_family_agrees_with_the_reference(family: str, tmp_path: Path) -> None:
    for seed in range(CASES[family]):
        folder = tmp_path / str(seed)
        folder.mkdir()
        case = Case(family, seed, folder)
        ending = end_of(case, all_families()[family])
        assert ending.outcome == "held", f"seed {seed}: {ending.text}; {case.facts}"
