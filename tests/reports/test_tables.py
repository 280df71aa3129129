"""A table is a list of columns: one more column shows in the terminal and on the page."""

from __future__ import annotations

import io
import math
from xml.etree import ElementTree

import pytest
from rich.console import Console

from modular_experts.reports.html import Html, element, note, page
from modular_experts.reports.tables import Column, Line, Table, listed, number, percent, points, share, times

COLUMNS = [
    Column("size", lambda rows: rows.get("size"), lambda size: f"{size} kB"),
    Column("held-in", lambda rows: rows["in"], percent, bar=True, over="exact match"),
    Column("held-out", lambda rows: rows.get("out"), percent, over="exact match"),
]
GROUPS = [
    [Line("head", {"in": 0.5}, strong=True), Line("a", {"size": 3, "in": 0.25, "out": 1.0}, key="key ties")],
    [Line("[b]", {"in": math.nan})],
]


def cells(html: str) -> list[list[str]]:
    return [["".join(cell.itertext()) for cell in row] for row in ElementTree.fromstring(html).iter("tr")]


def test_every_column_is_in_the_terminal_and_on_the_page() -> None:
    more = Table([*COLUMNS, Column("new", lambda rows: len(rows))], GROUPS, "name")
    stream = io.StringIO()
    Console(file=stream, width=80).print(more.text())
    lines = [line.split() for line in stream.getvalue().splitlines()]
    assert lines[:2] == [["exact", "match", "exact", "match"], ["name", "size", "held-in", "held-out", "new"]]
    assert lines[2:] == [["head", "50.0", "1"], ["a", "3", "kB", "25.0", "100.0", "3"], [], ["[b]", "-", "1"]]
    assert cells(more.html()) == [
        ["", "", "exact match", ""],
        ["name", "size", "held-in", "held-out", "new"],
        ["head", "", "50.0", "", "1"],
        ["a", "3 kB", "25.0", "100.0", "3"],
        ["[b]", "", "-", "", "1"],
    ]


def test_the_page_marks_heads_keys_bars_and_columns_that_belong_together() -> None:
    tree = ElementTree.fromstring(Table(COLUMNS, GROUPS).html())
    assert [row.get("class") for row in tree.iter("tr")] == ["over", None, "kind", None, None]
    assert [cell.get("colspan") for cell in tree.findall("table/thead/tr[1]/th")] == ["1", "1", "2"]
    assert [span.get("class") for span in tree.iter("span")] == ["key ties"]
    assert [cell.get("style") for cell in tree.iter("td") if cell.get("class") == "bar"][1] == "--share: 25.0%"
    assert len(tree.findall("table/tbody")) == 2


def test_text_never_becomes_markup() -> None:
    assert element("p", "a < b", Html("<b>c</b>"), title='"') == '<p title="&quot;">a &lt; b<b>c</b></p>'
    evil = "<script>"
    html = page(evil, note(evil), Table([Column(evil, str)], [[Line(evil, evil, key='"')]], evil).html())
    assert "<script" not in html
    assert "<style>:root" in html.replace("\n", "")


def test_no_line_ends_between_a_number_and_its_unit() -> None:
    assert note("5 % or 2 points") == '<p class="note">5&#160;% or 2&#160;points</p>'


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (percent(0.5561), "55.6"),
        (points(-0.0214), "2.1 points"),
        (share(0.0545), "5.45 %"),
        (number(0.12345, 3), "0.123"),
        (number(math.inf, 3), "-"),
        (times(0.750), "\N{MULTIPLICATION SIGN}0.75"),
        (listed(["a"]), "a"),
        (listed(["a", "b", "c"]), "a, b and c"),
    ],
)
def test_numbers_as_text(text: str, wanted: str) -> None:
    assert text == wanted
