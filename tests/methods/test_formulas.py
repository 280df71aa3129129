"""Each method merges random experts as its formula does, which `tests/soak/reference/merges.py` writes in float64."""

from functools import partial
from pathlib import Path

import pytest
from soak.case import Case, end_of
from soak.families.merges import NAMES, merge_case

CASES = 6
"""Random cases of each method; `make soak FAMILIES=merge` runs others."""


@pytest.mark.parametrize("name", NAMES)
def test_a_method_merges_as_its_formula_does(name: str, tmp_path: Path) -> None:
    for seed in range(CASES):
        folder = tmp_path / str(seed)
        folder.mkdir()
        case = Case(name, seed, folder)
        ending = end_of(case, partial(merge_case, name=name, kinds=("llama", "gpt2")))
        assert ending.outcome == "held", f"{ending.text}; {case.facts}"
