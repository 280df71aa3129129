"""Intervals, tables, the page, and the heat map show what the pieces measured."""

import math
import random
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

from modular_experts.evaluation.intervals import interval
from modular_experts.reports import Results
from modular_experts.reports.tables import heat_map
from modular_experts.study.piece import Piece
from modular_experts.study.report import write_report
from modular_experts.study.results import effects, over_draws
from modular_experts.study.run import State
from modular_experts.study.summary import findings, labelled, summary


def test_the_interval_of_equal_values_is_a_point_and_the_same_values_have_the_same_one() -> None:
    assert interval([0.25] * 10) == [0.25, 0.25]
    values = [0.0, 1.0, 1.0, 0.5]
    assert interval(values) == interval(values)


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
    drawn = heat_map(["x", "y"], ["a", "b"], values, "{:.1f}".format, ends=(0.0, 2.0))
    assert re.findall(r"--heat: (\d+)%", drawn) == ["50", "100", "100"], "beyond an end it is the tint of the end"


def found(model: str, own: list[str], right: dict[str, int], merge: str | None = None, seed: int = 0) -> dict[str, Any]:
    """Return the result of a model that answers the first `right` of 100 rows of each task."""
    tasks = {task: {"role": "held_in", "rows": 100, "exact_match": many / 100} for task, many in right.items()}
    values = {task: {"exact_match": [float(row < many) for row in range(100)]} for task, many in right.items()}
    about = {"model": model, "experts": own, "own": own, "kind": "lora", "merge": merge, "seed": seed}
    return about | {"count": len(own) if merge else None, "group": 0, "scores": {"tasks": tasks}, "values": values}


FACTS = {"kinds": ["lora"], "held_out": [], "seeds": [0], "failed": {}, "examples": [], "base": "base", "merges": {}}
FACTS |= {"machine": "", "versions": {}, "date": ""}


def test_a_merge_is_compared_with_the_own_expert_of_each_task_and_with_the_best_single_one() -> None:
    singles = [found("lora-a", ["a"], {"a": 80, "b": 70}), found("lora-b", ["b"], {"a": 10, "b": 50})]
    rows = effects([*singles, found("lora X", ["a", "b"], {"a": 60, "b": 60}, "X")], "exact_match")
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
    (sentence,) = map(str, findings(Results(rows, facts)))
    assert sentence.startswith("Merged by X, the 2 lora experts keep 97 % of their own exact match (-5.0 points, 95 %")
    assert sentence.endswith("most is lost on a (-20.0)")
    routed = facts | {"merges": {"lora": [{"name": "X", "router": "Centroid"}]}}
    assert str(findings(Results(rows, routed))[0]) == sentence.replace("Merged by", "Routed by")
    for kept in (49, 50, 60):
        merged = found("lora X", ["b"], {"b": kept}, "X")
        (sentence,) = map(str, findings(Results(effects([singles[1], merged], "exact_match"), facts)))
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
    rows = effects([*singles, both[0]], "loss")
    assert [row["interval"] for row in rows if row["metric"] == "gain"] == [None] * 3
    (finding,) = findings(Results(rows, {"kinds": ["lora"]}))
    assert finding.evidence.endswith("most is lost on a (+nan)")
    rows = effects([*singles, *both], "loss")
    assert str(findings(Results(rows, {"kinds": ["lora"]}))[0]).startswith(
        "Merged by Y, the 2 lora experts have 1.50 times"
    )
    assert interval([math.nan, 1.0]) is None


def test_the_rows_of_each_task_are_drawn_apart() -> None:
    singles = [found(f"lora-{task}", [task], {task: 80}) for task in "ab"]
    rows = effects([*singles, found("lora X", ["a", "b"], {"a": 60, "b": 60}, "X")], "exact_match")
    low, high = next(row["interval"] for row in rows if row["metric"] == "gain" and row["task"] is None)
    error = 1.96 * 0.04 / 2**0.5
    assert [low, high] == pytest.approx([-0.2 - error, -0.2 + error], abs=0.012)


def test_experts_that_have_nothing_right_get_gain_and_loss_no_empty_section_and_no_gain_from_noise(tmp_path) -> None:
    rows = effects([found("lora-a", ["a"], {"a": 0}), found("lora X", ["a"], {"a": 5}, "X")], "exact_match")
    assert {row["metric"]: row["value"] for row in rows if row["task"] == "a"} == {"gain": 0.05, "normalised": None}
    (sentence,) = map(str, findings(Results(rows, {"kinds": ["lora"]})))
    assert sentence.startswith("The 1 lora experts score 0 in exact match alone; X adds +5.0 points, ")
    single, merge = found("lora-a", ["a"], {"a": 0}), found("lora X", ["a"], {"a": 1}, "X")
    rows = effects([single, merge], "exact_match")
    (sentence,) = map(str, findings(Results(rows, {"kinds": ["lora"]})))
    assert sentence.startswith("The 1 lora experts score 0 in exact match alone, and X is level with them: +1.0 points")
    facts = FACTS | {"held_in": ["a"]}
    for one, loss in ((single, 3.0), (merge, 2.5)):
        about = {name: one[name] for name in ("model", "kind", "merge", "count", "group", "seed")}
        about |= {"task": "a", "role": "held_in", "own": True}
        right = one["scores"]["tasks"]["a"]["exact_match"]
        rows += [about | {"metric": "loss", "value": loss}, about | {"metric": "exact_match", "value": right}]
    table = summary(Results(rows, facts))
    (column,) = (column for column in table.columns if column.title == "loss")
    assert [column.of(line.rows) for line in table.groups[1]] == [3.0, 2.5]
    write_report(Results(rows, facts), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Gains and losses" in page
    assert "What merges kept" not in page
    # A page explains no column that it lacks.
    assert "Of own" not in page
    assert "half the 95" not in page
    assert "Kept is" not in page
    (sentence,) = map(
        str, findings(Results(effects([single, found("lora X", ["a"], {"a": 0}, "X")], "exact_match"), facts))
    )
    assert sentence == "The 1 lora experts score 0 in exact match alone, and so does X"


def test_a_page_leads_with_what_the_best_merge_keeps_and_calls_no_task_level_on_which_all_score_zero(tmp_path) -> None:
    pieces = [found("lora-a", ["a"], {"a": 80}), found("lora-b", ["b"], {"b": 0})]
    pieces.append(found("lora X", ["a", "b"], {"a": 80, "b": 0}, "X"))
    rows = effects(pieces, "exact_match")
    for piece in pieces:
        about = {name: piece[name] for name in ("model", "kind", "merge", "count", "group", "seed")}
        for task, scores in piece["scores"]["tasks"].items():
            score = {"task": task, "role": "held_in", "own": True, "metric": "exact_match"}
            rows.append({**about, **score, "value": scores["exact_match"]})
    write_report(Results(rows, FACTS | {"held_in": ["a", "b"]}), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text().replace("&#160;", " ")
    assert "<h1>Merged by X, the 2 lora experts keep 100 % of their own exact match</h1>" in page
    assert "lora X is level with the task&#x27;s own expert, or better, on 1 of 1 tasks" in page
    # The tint of a share goes from 0 to 100 %, and single experts stand beside merges.
    (every,) = re.findall(r'<section id="every-task">.*?</section>', page)
    heats = [
        (row, re.findall(r"--heat: (\d+)%", cells))
        for row, cells in re.findall(r"<tr><th [^>]*>(.*?)</th>(.*?)</tr>", every)
    ]
    assert heats == [("lora, single", ["80", "0"]), ("lora X", ["80", "0"])]


def test_tuned_merges_and_the_same_methods_untuned_are_called_so_and_the_library_keeps_their_names() -> None:
    ways = [
        {"name": "TIES at 1", "method": "TIES", "tune": None},
        {"name": "mine", "method": "TIES", "tune": {}},
        {"name": "Average", "method": "Average", "tune": None},
        {"name": "SLERP tuned", "method": "SLERP", "tune": {}},
        {"name": "TIES", "router": "Oracle"},
    ]
    rows = [{"kind": "lora", "merge": way["name"], "model": f"lora {way['name']} of 2, group 0"} for way in ways]
    answers = {"base": "1", "lora mine of 2, group 0": "2"}
    facts = {"merges": {"lora": ways}, "examples": [{"task": "a", "answers": answers}]}
    shown = labelled(Results(rows, facts))
    assert shown.values("merge") == ["mine as is", "mine tuned", "Average", "SLERP tuned", "TIES"]
    assert shown.rows[1]["model"] == "lora mine tuned of 2, group 0"
    assert [*shown.facts["examples"][0]["answers"]] == ["base", "lora mine tuned of 2, group 0"]
    assert labelled(shown).values("merge") == shown.values("merge")


def test_seeds_of_the_same_merge_are_pooled_and_other_groups_are_not() -> None:
    singles = [found("lora-a", ["a"], {"a": 50}, seed=seed) for seed in (0, 1)]
    merges = [found("lora X", ["a"], {"a": 40 + 20 * seed}, "X", seed) for seed in (0, 1)]
    rows = [row for row in effects([*singles, *merges], "exact_match") if row["metric"] == "gain"]
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
    rows = effects([*singles, *merges], "exact_match")
    rows += over_draws(Results(rows), {2: 2})
    (sentence,) = map(str, findings(Results(rows, {"kinds": ["lora"]})))
    assert sentence == (
        "Merged by steady, the 2 lora experts keep 120 % of their own exact match in the mean of 2 random groups "
        "(+10.0 points, 95 % interval +10.0 to +10.0)"
    )
    table = summary(Results([*rows, *draws("lucky", [0.9, 0.2])], {"kinds": ["lora"], "held_in": ["a"]}))
    assert "±" not in [column.title for column in table.columns]
    measured = draws("lucky", [0.9, 0.2])
    measured += over_draws(Results(measured), {2: 2})
    table = summary(Results(measured, {"kinds": ["lora"], "held_in": ["a"]}))
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
    assert str(summary(found).html()).count("best") == marked
