"""Run the cases that found defects, and one case of each family; `make soak` runs others."""

from pathlib import Path

import pytest

from soak.case import Case, end_of

KEPT_OF_FITS = [
    ("fit", 2),
    ("plans", 1),
    ("preferences", 1),
    ("quantised", 1),
    # Gradients could not be clipped in bf16-mixed.
    ("resume", 10),
    ("again", 2),
    ("halves", 1),
    ("laws", 7),
    ("by-token", 1),
    ("by-prompt", 8),
    ("mixtures", 1),
    ("serving", 8),
    # A conversation that fitted without the last newline of its template lost its oldest turns.
    ("conversations", 43),
    ("cache", 4),
    ("studies", 3),
    ("stale", 7),
    ("combine", 5),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "seed"), KEPT_OF_FITS)
def test_the_package_and_the_reference_agree(family: str, seed: int, tmp_path: Path) -> None:
    from soak.families import all_families

    ending = end_of(Case(family, seed, tmp_path), all_families()[family])
    assert ending.outcome == "held", ending.text
