"""Run a few cases of the quickest families in every run of the tests; `make soak` draws others."""

from pathlib import Path

import pytest

from soak.case import Case, end_of
from soak.families import all_families

CASES = {"by-token": 3, "cut": 8, "distill": 3, "export": 5, "file": 5, "hub": 2, "recipe": 12}
CASES |= {"remove": 4, "search": 5, "shrink": 4, "statistics": 8, "tune": 4}
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
