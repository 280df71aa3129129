"""Every mutant names text that the package has once, and tests that there are; `scripts/mutants.py` runs them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("file", sorted((ROOT / "tests" / "mutants").glob("*.yaml")), ids=lambda file: file.stem)
def test_mutants_name_what_there_is(file) -> None:
    for mutant in yaml.safe_load(file.read_text(encoding="utf-8")):
        text = (ROOT / mutant["file"]).read_text(encoding="utf-8")
        assert text.count(mutant["find"]) == 1, f"{mutant['file']}: {mutant['find']!r}"
        assert mutant["replace"] != mutant["find"]
        assert (ROOT / mutant["tests"].split()[0].partition("::")[0]).exists(), mutant["tests"]
