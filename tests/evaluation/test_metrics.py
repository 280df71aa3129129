"""Metrics read answers as numbers, JSON and patterns, and are named by path, by word and by pattern."""

from functools import partial

import pytest

from modular_experts.evaluation import text_metrics
from modular_experts.evaluation.intervals import share_interval
from modular_experts.evaluation.metrics import matched, named_metrics, number, same_json
from modular_experts.study.results import DRAWN, GAIN, NORMALISED, SIZE


@pytest.mark.parametrize(
    ("answer", "target", "same"),
    [
        ("The total is 1,250.0 dollars.", "1250", 1.0),
        ("about 10 000 people", "10000", 1.0),
        ("-1\u202f234\u00a0567.5", "-1,234,567.5", 1.0),
        ("10\u2009000", "10,000", 1.0),
        ("10 000", "0", 0.0),
        ("in 2019 300", "300", 1.0),
        ("sheet A4 200", "200", 1.0),
        ("1 0000", "0", 1.0),
        ("3 4 500", "4500", 1.0),
        ("7 50", "50", 1.0),
        ("7\n500", "500", 1.0),
        ("0,5", "5", 1.0),
        ("10 000,25", "25", 1.0),
        ("3 + 4 = 7", "7", 1.0),
        ("3 + 4 = 7", "3", 0.0),
        ("\u22125", "so it is -5", 1.0),
        ("5-3", "3", 1.0),
        ("on 2026-11-29", "29", 1.0),
        ("2e3 m", "2000", 1.0),
        ("0.1", ".1", 1.0),
        ("1,23", "123", 0.0),
        ("12345678901234567891", "12345678901234567890", 0.0),
        ("none", "7", 0.0),
        ("blue ", "blue", 1.0),
        ("5", "five", 0.0),
        ("it is 1e99999999999999999999999", "5", 0.0),
        ("1e-99999999999999999999999", "1e-99999999999999999999999", 1.0),
        ("10e999999998", "1e999999999", 1.0),
    ],
)
def test_the_last_number_of_an_answer_is_compared(answer: str, target: str, same: float) -> None:
    assert number(answer, target) == same


@pytest.mark.parametrize(
    ("answer", "target", "same"),
    [
        ('{"b": [1.0, 2],\n "a": null}', '{"a": null, "b": [1, 2]}', 1.0),
        ('```json\n{"a": 1}\n```', '{"a": 1}', 1.0),
        ('```json\r\n{"a": 1}\r\n```\r\n', '{"a": 1}', 1.0),
        ("[1, 2]", "[2, 1]", 0.0),
        ("true", "1", 0.0),
        ('"1"', "1", 0.0),
        ("null", "null", 1.0),
        ("[10000000000000000001]", "[10000000000000000000]", 0.0),
        ('{"a": 1', '{"a": 1}', 0.0),
        ("[" * 100_000, "[]", 0.0),
        ("no", " no", 1.0),
    ],
)
def test_json_is_compared_by_its_content(answer: str, target: str, same: float) -> None:
    assert same_json(answer, target) == same


def test_a_pattern_finds_the_same_last_text_in_both() -> None:
    last = partial(matched, r"#### (\S+)")
    assert last("#### 1, no, #### 42", "so #### 42") == 1.0
    assert last("#### 42", "42") == 1.0
    assert last("42, or so", "#### 42") == 0.0
    assert last("42", "#### 42") == 0.0
    assert matched(r"\d{4}", "in 1984", "1984 it was") == 1.0
    assert matched("[0-9]*", "in 1984, yes", "1984 it was") == 1.0
    assert matched("[0-9]*", "no year", "1984 it was") == 0.0
    either = partial(matched, r"a=(\d+)|b=(\d*)|c")
    assert [either("so b=3", target) for target in ("b=3.", "a=3", "b=4", "a=3, then b= and c")] == [1, 1, 0, 1]


def test_metrics_are_named_in_lists_and_mappings() -> None:
    listed = text_metrics(["number", "rougeL=stemmed_rouge_l", "year=/[0-9]{4}=?/", f"{number.__module__}.same_json"])
    assert [*listed] == ["exact_match", "rougeL", "number", "year", "same_json"]
    assert listed["year"].args == ("[0-9]{4}=?",)
    assert listed["rougeL"]("police kill", "police killed") == 1.0
    assert text_metrics({"year": "/[0-9]{4}=?/"})["year"].args == listed["year"].args
    assert [*text_metrics("json")] == ["exact_match", "rougeL", "json"]
    assert named_metrics([number, "/a=b/"]) == {"number": number, "regex": "/a=b/"}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("nmber", "`metrics.nmber=`: there is no metric 'nmber'; did you mean number"),
        ("nope.mine", "`metrics.mine=`: nope.mine cannot be imported"),
        ("os.system", "`metrics.system=`: os.system cannot be imported: the standard library has no metrics"),
        ("/(/", "`metrics.regex=`: /(/ is not a regular expression"),
        (["/a/", "/b/"], "two metrics are called regex; name one of them: regex-2=/b/"),
        ({"loss": "number"}, "a metric cannot be called loss"),
        *[({name: "number"}, f"a metric cannot be called {name}") for name in (GAIN, NORMALISED, DRAWN, SIZE)],
        ("torch.add", "metrics.add must score any generated text against its target, and failed with two texts"),
    ],
)
def test_a_metric_that_cannot_be_is_refused_in_one_sentence(given, sentence: str) -> None:
    with pytest.raises(ValueError, match=r"metrics|called") as caught:
        text_metrics(given)
    assert sentence in str(caught.value)


def test_the_interval_of_right_and_wrong_rows_is_wilsons_and_has_a_width_where_all_are_alike():
    z = 1.959963984540054
    for right, rows in ((0, 12), (3, 12), (12, 12), (49, 50)):
        low, high = share_interval([1.0] * right + [0.0] * (rows - right))
        # The ends are the shares from which the observed one is as far as chance takes 95 % of the samples.
        for end in (low, high):
            assert (right / rows - end) ** 2 == pytest.approx(z**2 * end * (1 - end) / rows, abs=1e-12)
        assert max(0.0, low) < high <= 1 + 1e-12
    # All of ten right: n / (n + z^2), as in Brown, Cai and DasGupta (2001).
    assert share_interval([1.0] * 10) == pytest.approx([10 / (10 + z**2), 1.0])
    # A mean over tasks: the distances of Wilson's ends, joined by squares.
    low, high = share_interval([1.0] * 10, [0.0] * 20)
    assert (low, high) == pytest.approx((0.5 - z**2 / (10 + z**2) / 2, 0.5 + z**2 / (20 + z**2) / 2))
    assert share_interval([0.5, 1.0]) is None
