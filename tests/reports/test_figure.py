"""A figure has a mark at each value, in the colours of its page or of its own."""

from xml.etree import ElementTree

import pytest

from modular_experts.reports.figure import NAMES, NUMBERS, MarkedRow, Panel, draw_panels

SVG = "{http://www.w3.org/2000/svg}"
GROUPS = [
    [
        MarkedRow("lora, single", 0.75, head=True),
        MarkedRow("TIES", 0.5, 0.25),
        MarkedRow("<b>", 0.0),
        MarkedRow("failed", None),
    ],
    [MarkedRow("full, single", None, head=True)],
]
PANELS = [Panel(f"{count} tasks", GROUPS, {"base": 0.1, "multitask": 0.9}) for count in (3, 2)]


def drawn(**how: bool) -> ElementTree.Element:
    return ElementTree.fromstring(draw_panels("Exact match & more", "filled: tuned", PANELS, **how))


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
