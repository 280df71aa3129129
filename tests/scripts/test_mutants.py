"""Every mutant names text that the package has once, and tests that there are; `scripts/mutants.py` runs them."""

import re
from pathlib import Path

import pytest
import yaml

from modular_experts import methods

ROOT = Path(__file__).parents[2]
FILES = sorted([*ROOT.glob("tests/mutants/*.yaml"), *ROOT.glob("tests/systems/*/mutants.yaml")])


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_mutants_name_what_there_is(file) -> None:
    for mutant in yaml.safe_load(file.read_text(encoding="utf-8")):
        text = (ROOT / mutant["file"]).read_text(encoding="utf-8")
        assert text.count(mutant["find"]) == 1, f"{mutant['file']}: {mutant['find']!r}"
        assert mutant["replace"] != mutant["find"]
        paths = [ROOT / word.partition("::")[0] for word in mutant["tests"].split() if "/" in word]
        assert all(path.exists() for path in paths), mutant["tests"]
        tests = "".join(path.read_text(encoding="utf-8") for path in paths if path.is_file())
        # `-k TIES` chooses a case of a test that takes each method.
        cases = " ".join(methods.__all__)
        names = re.findall(r"::(\w+)|(?:-k|and|or) (\w+)", mutant["tests"].lower())
        assert not tests or all("".join(name) in (tests + cases).lower() for name in names if "not" not in name), (
            mutant["tests"]
        )
