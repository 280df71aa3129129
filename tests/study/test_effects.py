"""Intervals, what is level with the best, tables, the heat map and figures of others show what the pieces measured."""

import io
import math
import random
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest
from rich.console import Console

from modular_experts.evaluation.intervals import interval
from modular_experts.reports import Results
from modular_experts.reports.tables import heat_map
from modular_experts.study.piece import Piece
from modular_experts.study.report import write_report
from modular_experts.study.results import effects, level_with, over_draws
from modular_experts.study.run import State
from modular_experts.study.summary import beside_published, findings, summary


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
    state = State([], {(number,): found for number, found in enumerate(done)}, {})
    level = {("lora", "best"): True, ("lora", "close"): True, ("lora", "far"): False}
    assert level_with(state) == level
    # The best one has no result of this seed, such as after a failure.
    state.done["alone",] = merged("alone", 79, seed=1)
    assert level_with(state) == level


def test_time_left_counts_what_nothing_alike_was_measured_of() -> None:
    keys = [("experts", "lora", "b", 0, "y"), ("experts", "sparse", "b", 0, "y"), ("tests", "lora", "a", 0, "z")]
    done = {("experts", "lora", "a", 0, "x"): {"seconds": 4.0}}
    assert State([Piece(key, print) for key in (*done, *keys)], done, {}).seconds_left() == (8.0, 1)


def test_the_heat_map_tints_the_best_strongest_and_shows_every_number() -> None:
    values = {("x", "a"): 1.0, ("x", "b"): 3.0, ("y", "a"): 2.0, ("y", "b"): None}
    for low_is_best, heats in ((False, ["0", "100", "50"]), (True, ["100", "0", "50"])):
        drawn = heat_map(["x", "y"], ["a", "b"], values, "{:.1f}".format, low_is_best)
        assert re.findall(r"--heat: (\d+)%", drawn) == heats
        cells = [cell.text for cell in ElementTree.fromstring(drawn).iter("td")]
        assert cells == ["1.0", "3.0", "2.0", None]


def found(model: str, own: list[str], right: dict[str, int], merge: str | None = None, seed: int = 0) -> dict[str, Any]:
    """Return the result of a model that answers the first `right` of 100 rows of each task."""
    tasks = {task: {"role": "held_in", "rows": 100, "exact_match": many / 100} for task, many in right.items()}
    values = {task: {"exact_match": [float(row < many) for row in range(100)]} for task, many in right.items()}
    about = {"model": model, "experts": own, "own": own, "kind": "lora", "merge": merge, "seed": seed}
    return about | {"count": len(own) if merge else None, "group": 0, "scores": {"tasks": tasks}, "values": values}


def state(*done: dict[str, Any]) -> State:
    return State([], {(number,): one for number, one in enumerate(done)}, {})


def test_a_merge_is_compared_with_the_own_expert_of_each_task_and_with_the_best_single_one() -> None:
    singles = [found("lora-a", ["a"], {"a": 80, "b": 70}), found("lora-b", ["b"], {"a": 10, "b": 50})]
    rows = effects(state(*singles, found("lora X", ["a", "b"], {"a": 60, "b": 60}, "X")), "exact_match")
    shown = {(row["metric"], row["task"]): row for row in rows}
    assert {key: row["value"] for key, row in shown.items()} == pytest.approx(
        {
            **{("gain", "a"): -0.2, ("gain", "b"): 0.1, ("gain", None): -0.05},
            **{("normalised", "a"): 0.75, ("normalised", "b"): 1.2, ("normalised", None): 0.975},
        }
    )
    assert [shown["gain", task]["best_single"] for task in "ab"] == ["a", "a"]
    assert shown["gain", "b"]["best_single_value"] == 0.7
    # 20 of 100 rows are lost, each with certainty: the interval of a share of 0.2, here by its standard error.
    low, high = shown["gain", "a"]["interval"]
    assert [low, high] == pytest.approx([-0.2 - 1.96 * 0.04, -0.2 + 1.96 * 0.04], abs=0.015)
    # The mean of two independent tasks is surer than either.
    low, high = shown["gain", None]["interval"]
    error = 1.96 * (0.04**2 + 0.03**2) ** 0.5 / 2
    assert [low, high] == pytest.approx([-0.05 - error, -0.05 + error], abs=0.015)
    facts = {"kinds": ["lora"]}
    (sentence,) = findings(Results(rows, facts))
    assert sentence.startswith("Merged by X, the 2 lora experts keep 97 % of their own exact match (-5.0 points, 95 %")
    assert sentence.endswith("most is lost on a (-20.0)")
    routed = facts | {"merges": {"lora": [{"name": "X", "router": "Centroid"}]}}
    assert findings(Results(rows, routed))[0] == sentence.replace("Merged by", "Routed by")
    for kept in (49, 50, 60):
        merged = found("lora X", ["b"], {"b": kept}, "X")
        (sentence,) = findings(Results(effects(state(singles[1], merged), "exact_match"), facts))
        assert sentence.endswith("each task is level with its own expert, or better")


def test_a_merge_that_diverged_is_worse_than_its_experts_and_never_the_best(tmp_path) -> None:
    def losing(model: str, own: list[str], loss: float, merge: str | None = None) -> dict[str, Any]:
        one = found(model, own, dict.fromkeys(own, 10), merge)
        for task in own:
            one["scores"]["tasks"][task]["loss"] = None if math.isnan(loss) else loss
            one["values"][task] |= {"loss": [loss] * 100, "tokens": [1.0] * 100}
        return one

    singles = [losing("lora-a", ["a"], 1.0), losing("lora-b", ["b"], 1.0)]
    both = [losing(f"lora {name}", ["a", "b"], loss, name) for name, loss in (("X", math.nan), ("Y", 1.5))]
    rows = effects(state(*singles, both[0]), "loss")
    assert [row["interval"] for row in rows if row["metric"] == "gain"] == [None] * 3
    assert findings(Results(rows, {"kinds": ["lora"]}))[0].endswith("most is lost on a (+nan)")
    rows = effects(state(*singles, *both), "loss")
    assert findings(Results(rows, {"kinds": ["lora"]}))[0].startswith("Merged by Y, the 2 lora experts have 1.50 times")
    assert interval([math.nan, 1.0]) is None
    diverged = merged("X", 80)
    diverged["values"]["a"]["exact_match"] = [math.nan] * 100
    done = [diverged, merged("Y", 60)]
    assert level_with(state(*done)) == {("lora", "X"): False, ("lora", "Y"): True}
    # Equal in exact match: the metric of the table decides.
    ways = [losing(f"lora {name}", ["a", "b"], loss, name) for name, loss in (("Y", 1.5), ("Z", 2.0))]
    rows = [one | {"task": "a", "role": "held_in", "own": True, "metric": "loss", "value": 1.0} for one in ways]
    table = summary(Results(rows, {"kinds": ["lora"], "held_in": ["a", "b"]}), state(*ways))
    assert [line.rows.facts["level"] for line in table.groups[1][1:]] == ["level", None]


def test_the_rows_of_each_task_are_drawn_apart() -> None:
    singles = [found(f"lora-{task}", [task], {task: 80}) for task in "ab"]
    rows = effects(state(*singles, found("lora X", ["a", "b"], {"a": 60, "b": 60}, "X")), "exact_match")
    low, high = next(row["interval"] for row in rows if row["metric"] == "gain" and row["task"] is None)
    error = 1.96 * 0.04 / 2**0.5
    assert [low, high] == pytest.approx([-0.2 - error, -0.2 + error], abs=0.012)


def test_experts_that_have_nothing_right_get_gain_and_loss_no_empty_section_and_no_gain_from_noise(tmp_path) -> None:
    rows = effects(state(found("lora-a", ["a"], {"a": 0}), found("lora X", ["a"], {"a": 5}, "X")), "exact_match")
    assert {row["metric"]: row["value"] for row in rows if row["task"] == "a"} == {"gain": 0.05, "normalised": None}
    (sentence,) = findings(Results(rows, {"kinds": ["lora"]}))
    assert sentence.startswith("The 1 lora experts score 0 in exact match alone; X adds +5.0 points, ")
    single, merge = found("lora-a", ["a"], {"a": 0}), found("lora X", ["a"], {"a": 1}, "X")
    rows = effects(state(single, merge), "exact_match")
    (sentence,) = findings(Results(rows, {"kinds": ["lora"]}))
    assert sentence.startswith("The 1 lora experts score 0 in exact match alone, and X is level with them: +1.0 points")
    facts = {"kinds": ["lora"], "held_in": ["a"], "held_out": [], "seeds": [0], "failed": {}, "examples": []}
    facts |= {"base": "base", "machine": "", "versions": {}, "date": "", "published": None, "merges": {}}
    for one, loss in ((single, 3.0), (merge, 2.5)):
        about = {name: one[name] for name in ("model", "kind", "merge", "count", "group", "seed")}
        about |= {"task": "a", "role": "held_in", "own": True}
        right = one["scores"]["tasks"]["a"]["exact_match"]
        rows += [about | {"metric": "loss", "value": loss}, about | {"metric": "exact_match", "value": right}]
    table = summary(Results(rows, facts), state())
    (column,) = (column for column in table.columns if column.title == "loss")
    assert [column.of(line.rows) for line in table.groups[1]] == [3.0, 2.5]
    write_report(Results(rows, facts), state(), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Gains and losses" in page
    assert "What merges kept" not in page


def test_seeds_of_the_same_merge_are_pooled_and_other_groups_are_not() -> None:
    singles = [found("lora-a", ["a"], {"a": 50}, seed=seed) for seed in (0, 1)]
    merges = [found("lora X", ["a"], {"a": 40 + 20 * seed}, "X", seed) for seed in (0, 1)]
    rows = [row for row in effects(state(*singles, *merges), "exact_match") if row["metric"] == "gain"]
    assert [(row["task"], row["seed"], round(row["value"], 6)) for row in rows] == [("a", None, 0.0), (None, None, 0.0)]
    low, high = rows[0]["interval"]
    assert low < -0.02
    assert high > 0.02


def draws(merge: str, values: list[float], metric: str = "exact_match", count: int = 2) -> list[dict[str, Any]]:
    """Return rows of random groups of experts, each with its value on two tasks."""
    about = {"kind": "lora", "merge": merge, "count": count, "seed": 0, "role": "held_in", "own": True}
    return [
        about | {"model": f"{merge} {group}", "group": group, "metric": metric, "task": task, "value": value + part}
        for group, value in enumerate(values)
        for task, part in (("a", -0.1), ("b", 0.1))
    ]


def test_random_groups_are_averaged_with_an_interval_over_the_groups() -> None:
    draw = random.Random(0)
    values = [float(draw.random() < 0.5) for _ in range(400)]
    (row,) = over_draws(Results([*draws("X", values), *draws("X", values, count=3)]), {2: 400})
    mean = sum(values) / len(values)
    error = 1.96 * (mean * (1 - mean) / len(values)) ** 0.5
    assert [row["count"], row["of"], row["draws"], row["value"]] == [2, "exact_match", 400, pytest.approx(mean)]
    assert row["interval"] == pytest.approx([mean - error, mean + error], abs=0.01)
    (row,) = over_draws(Results(draws("X", [0.5])), {2: 1})
    assert row["interval"] is None


def test_the_best_merge_of_random_groups_is_the_one_with_the_best_mean() -> None:
    """And not the one with the luckiest group."""
    singles = [found(f"lora-{task}", [task], {task: 50}) for task in "abc"]
    merges = []
    for merge, right in (("lucky", (90, 20)), ("steady", (60, 60))):
        for group, (own, many) in enumerate(zip((["a", "b"], ["b", "c"]), right, strict=True)):
            one = found(f"lora {merge} of 2, group {group}", own, dict.fromkeys(own, many), merge)
            merges.append(one | {"group": group})
    rows = effects(state(*singles, *merges), "exact_match")
    rows += over_draws(Results(rows), {2: 2})
    (sentence,) = findings(Results(rows, {"kinds": ["lora"]}))
    assert sentence == (
        "Merged by steady, the 2 lora experts keep 120 % of their own exact match in the mean of 2 random groups "
        "(+10.0 points, 95 % interval +10.0 to +10.0)"
    )
    table = summary(Results([*rows, *draws("lucky", [0.9, 0.2])], {"kinds": ["lora"], "held_in": ["a"]}), state())
    assert "±" not in [column.title for column in table.columns]
    measured = draws("lucky", [0.9, 0.2])
    measured += over_draws(Results(measured), {2: 2})
    table = summary(Results(measured, {"kinds": ["lora"], "held_in": ["a"]}), state())
    low, high = interval([0.9, 0.2])
    (half,) = (column for column in table.columns if column.title == "±")
    assert half.of(table.groups[1][1].rows) == pytest.approx((high - low) / 2)


@pytest.mark.parametrize(("counts", "marked"), [((5, 5), 1), ((2, 5), 0)])
def test_the_best_merge_is_marked_only_among_merges_of_as_many_experts(counts, marked) -> None:
    about = {"kind": "lora", "metric": "exact_match", "task": "a", "role": "held_in", "own": True}
    rows = [
        about | {"model": f"{number}", "merge": f"{number}", "count": count, "value": number / 10}
        for number, count in enumerate(counts)
    ]
    found = Results(rows, {"kinds": ["lora"], "held_in": ["a"]})
    assert str(summary(found, State([], {}, {})).html()).count("best") == marked


THEIRS = {"lora TIES": {"held_in": 50.21, "held_out": 46.16}, "lora, single": {"held_in": 77.5}}
GIVEN = {"source": "arXiv 2507.07140", "metric": "rougeL", "rows": THEIRS}


def row(model: str, task: str, value: float, kind: str | None = "lora", merge: str | None = None, **more: bool) -> dict:
    role = "held_out" if task == "c" else "held_in"
    about = {"model": model, "experts": [], "kind": kind, "merge": merge, "task": task, "role": role}
    return {**about, "metric": "rougeL", "value": value, **more}


ROWS = [
    row("lora-a", "a", 0.9, own=True),
    row("lora-a", "b", 0.1, own=False),
    row("lora-b", "b", 0.7, own=True),
    row("lora TIES", "a", 0.5, merge="TIES", own=True),
    row("lora TIES", "b", 0.25, merge="TIES", own=True),
    row("lora TIES", "c", 0.125, merge="TIES", own=False),
]


def test_their_figures_stand_beside_our_means_in_per_cent_as_they_published_them() -> None:
    console = Console(width=80, file=io.StringIO(), color_system=None)
    console.print(beside_published(Results(ROWS, {"published": GIVEN})).text())
    assert [line.split() for line in console.file.getvalue().splitlines()] == [
        ["held-in", "held-in", "held-out", "held-out"],
        ["Rouge-L", "%", "ours", "published", "ours", "published"],
        ["lora", "TIES", "37.5", "50.21", "12.5", "46.16"],
        # A single expert is judged by its own task alone.
        ["lora,", "single", "80.0", "77.50"],
    ]
