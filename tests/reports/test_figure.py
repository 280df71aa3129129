"""Figures and curves have a mark at each value, in the colours of their page or of their own."""

import math
import re
from xml.etree import ElementTree

import pytest

from modular_experts.reports.curve import Point, draw_curves
from modular_experts.reports.figure import NAMES, NUMBERS, Panel, Row, draw

SVG = "{http://www.w3.org/2000/svg}"
GROUPS = [
    [Row("lora, single", 0.75, head=True), Row("TIES", 0.5, 0.25), Row("<b>", 0.0), Row("failed", None)],
    [Row("full, single", None, head=True)],
]
PANELS = [Panel(f"{count} tasks", GROUPS, {"base": 0.1, "multitask": 0.9}) for count in (3, 2)]


def drawn(**how: bool) -> ElementTree.Element:
    return ElementTree.fromstring(draw("Exact match & more", "filled: tuned", PANELS, **how))


def test_each_value_has_its_mark_at_its_place_on_the_axis() -> None:
    tree = drawn(wide=False)
    width = 390 - NAMES - NUMBERS
    places = [(circle.get("class") or "", float(circle.get("cx"))) for circle in tree.iter(f"{SVG}circle")]
    hollow, filled, zero = ("before", NAMES + width / 4), ("", NAMES + width / 2), ("", NAMES)
    assert places == 2 * [hollow, filled, zero]
    bars = [float(line.get("x1")) for line in tree.iter(f"{SVG}line") if line.get("class") == "bar"]
    assert bars == pytest.approx(2 * [NAMES + 0.75 * width])
    texts = [text.text for text in tree.iter(f"{SVG}text")]
    assert texts.count("TIES") == 2
    assert texts.count("75.0") == 2
    assert {"base 10.0", "multitask 90.0", "<b>"} <= {*texts}


CURVES = {
    "sparse": [
        Point("sign", 0.2, 0.9),
        Point("int4", 0.5, 1.0),
        Point("as large", 0.5, 0.97),
        Point("worse", 0.7, 0.95),
        Point("as trained", 2.0, 1.0),
    ],
    "lora": [Point("rank 1", 0.02, 0.6), Point("bfloat16", 0.7, 1.0)],
}


@pytest.mark.parametrize("wide", [True, False])
def test_marks_lie_at_the_logarithm_of_the_bytes_and_at_the_share(wide) -> None:
    picture = ElementTree.fromstring(draw_curves("What is kept", "over bytes", CURVES, wide))
    marks = [one for one in picture.iter() if one.tag.endswith("circle")]
    titles = [re.match("[^:]*", mark[0].text)[0] for mark in marks]
    assert sorted(titles) == sorted(point.name for points in CURVES.values() for point in points)
    of = dict(zip(titles, ((float(mark.get("cx")), float(mark.get("cy"))) for mark in marks), strict=True))
    apart = of["int4"][0] - of["sign"][0], of["as trained"][0] - of["int4"][0]
    assert apart[0] / apart[1] == pytest.approx(math.log(0.5 / 0.2) / math.log(2.0 / 0.5), abs=0.02)
    assert (of["sign"][1] - of["int4"][1]) / (of["worse"][1] - of["int4"][1]) == pytest.approx(2, abs=0.05)
    hollow = {title for title, mark in zip(titles, marks, strict=True) if mark.get("class") == "before"}
    assert hollow == {"as large", "worse", "as trained"}, "a way of no more bytes keeps as much"
    assert titles[:3] == ["as large", "worse", "as trained"], "filled marks lie over them"
    named = {one.text for one in picture.iter() if one.tag.endswith("text")}
    assert {"sign", "int4", "rank 1", "bfloat16", "sparse", "lora"} <= named
    assert not named & {"as large", "worse", "as trained"}
