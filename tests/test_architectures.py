"""Each family in the table of architectures takes the steps that its line says; the slow tests run all of them."""

from pathlib import Path

import pytest
from architectures import FAMILIES, PAGE, passed_through

OFTEN = ("Llama", "GPT-2", "Falcon", "Mixtral", "gpt-oss")


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=[] if family in OFTEN else pytest.mark.slow) for family in FAMILIES]
)
def test_the_table_has_what_ran(family: str, tmp_path: Path) -> None:
    assert passed_through(family, tmp_path).line(family) in PAGE.read_text().splitlines()


def test_the_table_has_all_families_and_no_other() -> None:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0][2:] for line in lines[1:]] == list(FAMILIES)
