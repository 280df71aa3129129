"""Intervals, what is level with the best, the tables and the heat map show what the pieces measured."""

from __future__ import annotations

import random
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

from modular_experts.reports.heat import heat_map
from modular_experts.study.results import interval, level_with
from modular_experts.study.run import Left, Pace, State


def test_the_interval_of_equal_values_is_a_point_and_that_of_a_coin_has_its_width() -> None:
    assert interval([0.25] * 10) == [0.25, 0.25]
    draw = random.Random(0)
    values = [float(draw.random() < 0.5) for _ in range(400)]
    low, high = interval(values)
    mean = sum(values) / len(values)
    # The normal approximation: 1.96 standard errors on each side.
    error = 1.96 * (mean * (1 - mean) / len(values)) ** 0.5
    assert abs(low - (mean - error)) < 0.01
    assert abs(high - (mean + error)) < 0.01
    assert interval(values) == [low, high]


def merged(merge: str, right: int, seed: int = 0, count: int = 2) -> dict[str, Any]:
    """Return the result of a merge that answers the first `right` of 100 rows of a task."""
    values = [float(row < right) for row in range(100)]
    scores = {"tasks": {"a": {"role": "held_in"}, "b": {"role": "held_out"}}}
    by_task = {"a": {"exact_match": values}, "b": {"exact_match": [1.0] * 100}}
    return {"kind": "lora", "merge": merge, "count": count, "seed": seed, "scores": scores, "values": by_task}


def test_a_merge_is_level_with_the_best_if_the_difference_lies_inside_the_noise() -> None:
    done = [merged("best", 80), merged("close", 79), merged("far", 40), merged("few", 99, count=1)]
    state = State([], {(number,): found for number, found in enumerate(done)}, {}, Left(0.0, 0, 0))
    assert level_with(state) == {("lora", "best"): True, ("lora", "close"): True, ("lora", "far"): False}


def test_time_left_counts_what_nothing_alike_was_measured_of() -> None:
    from modular_experts.jobs import Piece

    pace = Pace({("experts", "lora", "a", 0, "x"): {"seconds": 4.0, "expert": {"bytes": 100}}})
    pieces = [Piece(("experts", kind, "b", 0, "y"), print) for kind in ("lora", "sparse")]
    assert pace.left([*pieces, Piece(("tests", "lora", "a", 0, "z"), print)]) == Left(8.0, 1, 200)


def test_the_heat_map_tints_the_best_strongest_and_shows_every_number() -> None:
    values = {("x", "a"): 1.0, ("x", "b"): 3.0, ("y", "a"): 2.0, ("y", "b"): None}
    for low_is_best, heats in ((False, ["0", "100", "50"]), (True, ["100", "0", "50"])):
        drawn = heat_map(["x", "y"], ["a", "b"], values, "{:.1f}".format, low_is_best)
        assert re.findall(r"--heat: (\d+)%", drawn) == heats
        cells = [cell.text for cell in ElementTree.fromstring(drawn).iter("td")]
        assert cells == ["1.0", "3.0", "2.0", None]
