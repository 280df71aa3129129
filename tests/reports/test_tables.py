"""A table is a list of columns: one more column shows in the terminal and on the page."""

from __future__ import annotations

import io
import math
from operator import itemgetter
from xml.etree import ElementTree

import pytest
from rich.console import Console

from modular_experts.reports.html import Html, Section, element, example, note, page, report
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
    assert [row.get("class") for row in tree.iter("tr")] == ["over", None, "kind", "ties", None]
    assert [cell.get("colspan") for cell in tree.findall("table/thead/tr[1]/th")] == ["1", "1", "2"]
    assert [span.get("class") for span in tree.iter("span")] == ["key ties"]
    assert [cell.get("style") for cell in tree.iter("td") if cell.get("class") == "bar"][1] == "--share: 25.0%"
    assert len(tree.findall("table/tbody")) == 2


def bold(table: Table) -> list[str]:
    return [cell.text for cell in ElementTree.fromstring(table.html()).iter("td") if "best" in cell.get("class", "")]


def test_the_best_of_a_group_or_of_a_line_is_marked_and_what_looks_alike_is_as_good() -> None:
    columns = [Column(name, itemgetter(name), percent, best=best) for name, best in {"a": "high", "b": "low"}.items()]
    lines = {"x": (0.50001, 0.3), "y": (0.5, 0.1), "z": (0.1, math.nan)}
    group = [Line(name, {"a": a, "b": b}) for name, (a, b) in lines.items()]
    assert bold(Table(columns, [group])) == ["50.0", "50.0", "10.0"]
    assert bold(Table([columns[0]], [[line] for line in group])) == []
    line = [Line("x", {"a": 0.5, "b": 0.25, "c": None})]
    across = [Column(name, itemgetter(name), percent, best="high") for name in "abc"]
    assert bold(Table(across, [line], across=True)) == ["50.0"]


def test_an_example_marks_answers_and_the_contents_link_to_the_sections() -> None:
    shown = example("1+1=", "2", {"base": "two", "merged": " 2 "})
    lines = ["".join(row.itertext()).split() for row in ElementTree.fromstring(shown)]
    assert lines == [["input1+1="], ["wanted2"], ["basetwo", "wrong"], ["merged", "2", "right"]]
    tree = ElementTree.fromstring(report("t", [], [Section("A & b", "It is 5 %", [])], {}).partition("\n")[2])
    assert tree.find("body/main/nav/a").get("href") == "#a-b"
    assert tree.find("body/main/section").get("id") == "a-b"


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
