"""Run the cases that found defects, and one case of each family; `make soak` runs others."""

from pathlib import Path

import pytest

from soak.case import Case, end_of

KEPT_OF_FILES = [
    ("merge", 1),
    ("file", 1),
    ("cut", 1),
    ("remove", 1),
    # Where the experts of a merge had cancelled, what was left of the others stayed at the base.
    ("remove", 70),
    ("interference", 1),
    ("apply", 1),
    # A checkpoint of another dtype rounded the weights of a mixture of experts twice.
    ("apply", 46),
    ("export", 1),
    ("import", 1),
    ("recipe", 1),
    ("statistics", 1),
    ("tune", 1),
    ("search", 1),
    ("distill", 1),
    ("shrink", 1),
    # An expert that moves a bias was refused on a quantised base.
    ("quantised-sum", 8),
]
KEPT_OF_FITS = [
    ("fit", 2),
    ("plans", 1),
    ("preferences", 1),
    # A step in which no token reaches a matrix of a mixture makes no step for it.
    ("preferences", 80026),
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
@pytest.mark.parametrize(("family", "seed"), [*KEPT_OF_FILES, *KEPT_OF_FITS])
def test_the_package_and_the_reference_agree(family: str, seed: int, tmp_path: Path) -> None:
    from soak.families import all_families

    ending = end_of(Case(family, seed, tmp_path), all_families()[family])
    assert ending.outcome == "held", ending.text
