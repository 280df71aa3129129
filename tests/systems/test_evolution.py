"""Evolution: it finds known optima, stays inside a limit, improves only, and goes on after an interruption exactly."""

import itertools
import math
import random

import pytest

from modular_experts.reports.json_lines import JSONLines
from modular_experts.systems.evolution import Category, Evolution, Mask, Real, Whole

SPACE = [Category(4)] * 12
COSTS = [1 + place % 3 for place in range(12)]


def rugged(genes) -> float:
    """Lowest where each gene has the value of its place, with a reward for equal neighbours that pulls elsewhere."""
    wrong = sum(gene != (place * 7) % 4 for place, gene in enumerate(genes))
    return wrong - 0.3 * sum(one == other for one, other in itertools.pairwise(genes))


def cost(genes) -> int:
    return sum(gene * price for gene, price in zip(genes, COSTS, strict=True))


def within(genes):
    return genes if cost(genes) <= 20 else None


def test_the_best_of_four_to_the_twelfth_is_found_in_800_measurements() -> None:
    goal = tuple((place * 7) % 4 for place in range(12))
    for seed in range(3):
        found = Evolution(evaluations=800, seed=seed).search(SPACE, rugged)
        assert found.best == goal
        assert found.value == rugged(goal)


def test_nothing_outside_of_the_limit_is_measured_nor_anything_twice() -> None:
    asked = []
    found = Evolution(evaluations=300).search(SPACE, lambda genes: asked.append(genes) or rugged(genes), within=within)
    assert len(asked) == len(set(asked)) == len(found.measured) == 300
    assert max(map(cost, asked)) <= 20
    assert found.value == min(map(rugged, asked)) == rugged(found.best)
    # Better than the same number of draws: the children of the best are better than the first candidates.
    assert found.value < min(value for _, value in found.measured[:50])


def test_a_repair_replaces_a_candidate_before_it_is_measured() -> None:
    def lighter(genes):
        genes = list(genes)
        for place in itertools.cycle(range(12)):
            if cost(genes) <= 6:
                return tuple(genes)
            genes[place] = max(genes[place] - 1, 0)

    found = Evolution(evaluations=200).search(SPACE, rugged, within=lighter)
    assert max(cost(genes) for genes, _ in found.measured) <= 6


def test_a_limit_that_nothing_meets_is_refused_before_anything_is_measured() -> None:
    asked = []
    with pytest.raises(ValueError, match="none of 2000 candidates drawn at random is inside the limit"):
        Evolution().search(SPACE, asked.append, within=lambda genes: None)
    assert not asked


def test_a_small_space_is_measured_whole_and_the_search_ends() -> None:
    found = Evolution(evaluations=100, first=2).search([Category(3), Category(2)], sum)
    assert sorted(genes for genes, _ in found.measured) == list(itertools.product(range(3), range(2)))
    assert found.best == (0, 0)
    alone = Evolution(evaluations=5).search([Category(1)], sum)
    assert alone.measured == [((0,), 0)]


def test_given_candidates_are_measured_first_inside_of_the_limit() -> None:
    start = [(3,) * 12, (1,) * 12, (0,) * 12, (0,) * 12]
    found = Evolution(evaluations=10).search(SPACE, rugged, start=start, within=lambda g: within(g) and g)
    assert [genes for genes, _ in found.measured[:2]] == [(0,) * 12, found.measured[1][0]]
    assert (3,) * 12 not in dict(found.measured)


class Interrupted(Exception):
    pass


def test_an_interrupted_search_goes_on_exactly_where_it_was(tmp_path) -> None:
    space = [*SPACE[:6], Whole(1, 9), Real(0, 1), Mask(5)]

    def function(genes):
        return rugged(genes[:6]) + abs(genes[6] - 4) + genes[7] + genes[8].index("1")

    whole = Evolution(evaluations=120, seed=3).search(space, function)
    asked = []

    def until_70(genes):
        if len(asked) == 70:
            raise Interrupted
        asked.append(genes)
        return function(genes)

    for _ in range(2):
        evolution, asked = Evolution(evaluations=120, seed=3), []
        try:
            found = evolution.search(space, until_70, store=JSONLines(tmp_path / "values.jsonl"))
        except Interrupted:
            assert asked == [genes for genes, _ in whole.measured[:70]]
    assert asked == [genes for genes, _ in whole.measured[70:]]
    assert found.measured == whole.measured
    assert found.best == whole.best


@pytest.mark.parametrize(("bottom", "seed"), [([0.5], 0), ([0.2, -1.1], 1), ([1.0, 0.3, -0.4, 0.0], 2)])
def test_one_parent_closes_in_on_the_bottom_of_a_bowl(bottom, seed) -> None:
    def bowl(genes):
        return sum(
            (1 + place) * (gene - goal) ** 2 for place, (gene, goal) in enumerate(zip(genes, bottom, strict=True))
        )

    single = Evolution(evaluations=300, first=1, parents=1, crossover=0.0, mutation=1.0, seed=seed)
    found = single.search([Real(-1.5, 1.5)] * len(bottom), bowl, start=[(0.0,) * len(bottom)])
    assert found.best == pytest.approx(bottom, abs=0.02)
    outside = single.search([Real(-1.5, 1.5)] * 3, lambda genes: sum(abs(gene - 4) for gene in genes))
    assert outside.best == (1.5, 1.5, 1.5), "a best point outside of the range ends at its bound"


@pytest.mark.parametrize(
    ("held", "overlap", "most"), [(20, 0.8, 3), (25, 0.5, 12), (30, 0.9, 2), (3, 0.8, 1), (38, 0.5, 2)]
)
def test_a_changed_mask_holds_as_many_and_keeps_more_than_the_overlap(held, overlap, most) -> None:
    numbers, mask = random.Random(0), Mask(40, overlap)
    old = "1" * held + "0" * (40 - held)
    exchanged, gone = [], set()
    for _ in range(400):
        new = mask.changed(old, 1 / 6, numbers)
        assert (len(new), new.count("1")) == (40, held)
        left = {place for place in range(held) if new[place] == "0"}
        exchanged.append(len(left))
        gone |= left
    assert {*exchanged} == {*range(1, most + 1)}, "more than the overlap stays, or all but one"
    assert gone == {*range(held)}, "each member may go"
    assert [mask.changed(same * 40, 1 / 6, numbers) for same in "01"] == ["0" * 40, "1" * 40]


def test_nan_is_worse_than_every_number_and_numbers_stay_in_their_range() -> None:
    found = Evolution(evaluations=200, first=5).search(
        [Real(-1, 1), Whole(-3, 3)], lambda genes: math.nan if genes[0] > 0 else -genes[0] + genes[1]
    )
    assert found.best[0] == pytest.approx(0, abs=0.05)
    assert found.best[1] == -3
    assert all(-1 <= one <= 1 and -3 <= two <= 3 and isinstance(two, int) for (one, two), _ in found.measured)
