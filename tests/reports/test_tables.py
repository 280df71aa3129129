"""A table is a list of columns: one more column shows in the terminal and on the page."""

import io
import math
from operator import itemgetter
from xml.etree import ElementTree

from rich.console import Console

from modular_experts.reports.page import answers_section, example, shortened, telling_example
from modular_experts.reports.tables import Column, Html, Line, Table, element, note, page, percent

COLUMNS = [
    Column("size", lambda rows: rows.get("size"), lambda size: f"{size} kB"),
    Column("held-in", lambda rows: rows["in"], percent, bar=True, over="exact match"),
    Column("held-out", lambda rows: rows.get("out"), percent, over="exact match"),
]
GROUPS = [
    [Line("head", {"in": 0.5}, strong=True), Line("a", {"size": 3, "in": 0.25, "out": 1.0})],
    [Line("[b]", {"in": math.nan})],
]


def cells(html: str) -> list[list[str]]:
    return [["".join(cell.itertext()) for cell in row] for row in ElementTree.fromstring(html).iter("tr")]


def test_every_column_is_in_the_terminal_and_on_the_page() -> None:
    more = Table([*COLUMNS, Column("[/new]", lambda rows: len(rows))], GROUPS, "name")
    stream = io.StringIO()
    Console(file=stream, width=80).print(more.text())
    lines = [line.split() for line in stream.getvalue().splitlines()]
    assert lines[:2] == [["exact", "match", "exact", "match"], ["name", "size", "held-in", "held-out", "[/new]"]]
    assert lines[2:] == [["head", "50.0", "1"], ["a", "3", "kB", "25.0", "100.0", "3"], [], ["[b]", "-", "1"]]
    assert cells(more.html()) == [
        ["", "", "exact match", ""],
        ["name", "size", "held-in", "held-out", "[/new]"],
        ["head", "", "50.0", "", "1"],
        ["a", "3 kB", "25.0", "100.0", "3"],
        ["[b]", "", "-", "", "1"],
    ]


def bold(table: Table) -> list[str]:
    return [cell.text for cell in ElementTree.fromstring(table.html()).iter("td") if "best" in cell.get("class", "")]


def test_the_best_of_a_group_is_marked_and_what_looks_alike_is_as_good() -> None:
    columns = [Column(name, itemgetter(name), percent, best=best) for name, best in {"a": "high", "b": "low"}.items()]
    lines = {"x": (0.50001, 0.3), "y": (0.5, 0.1), "z": (0.1, math.nan)}
    group = [Line(name, {"a": a, "b": b}) for name, (a, b) in lines.items()]
    assert bold(Table(columns, [group])) == ["50.0", "50.0", "10.0"]
    assert bold(Table([columns[0]], [[line] for line in group])) == []


ROWS = [
    {"task": "sums", "input": "1+1=", "target": "2", "answers": {"base": "2", "merged": "2", "mine": "3"}},
    {"task": "sums", "input": "1+2=", "target": "3", "answers": {"base": "two", "merged": " 3 ", "mine": "3"}},
]


def test_an_example_marks_answers_and_the_telling_row_comes_first() -> None:
    assert telling_example(ROWS, "exact_match", "base", ["merged"])[1] == example(ROWS[1], "exact_match")
    assert telling_example(ROWS, "exact_match", "merged", ["base"])[1] == example(ROWS[0], "exact_match")
    shown = example(ROWS[1], "loss", ["base", "merged", "gone"])
    lines = ["".join(row.itertext()).split() for row in ElementTree.fromstring(shown)]
    assert lines == [["input1+2="], ["wanted3"], ["basetwo", "wrong"], ["merged", "3", "right"]]
    silent = {"input": "1", "target": "2", "answers": {"base": " \n"}}
    assert "".join(ElementTree.fromstring(example(silent, "loss")).itertext()).split() == [
        "input1wanted2baseempty",
        "wrong",
    ]
    (answers,) = answers_section(ROWS, "loss", lambda task: ["mine"]).parts
    assert "".join(ElementTree.fromstring(answers).itertext()).split() == ["sumsinput1+1=wanted2mine3", "wrong"]


def test_the_telling_row_is_one_on_which_the_models_differ_and_many_tasks_are_folded() -> None:
    alike = {"task": "sums", "input": "", "target": "3", "answers": {"base": "", "a": "3", "b": "3"}}
    unlike = alike | {"answers": {"base": "", "a": "3", "b": "4"}}
    assert telling_example([alike, unlike], "exact_match", "base", ["a", "b"])[1] == example(unlike, "exact_match")
    assert telling_example([alike], "exact_match", "base", ["a", "b"])[1] == example(alike, "exact_match")
    rows = [unlike | {"task": f"task {number}"} for number in range(4)]
    folds = [ElementTree.fromstring(part) for part in answers_section(rows, "exact_match").parts]
    assert [fold.tag for fold in folds] == 4 * ["details"]
    assert folds[0][0].text == "task 0: 1 of 3 answers are right"


def test_an_example_shortens_long_texts_and_runs_of_empty_lines() -> None:
    assert shortened("a\nb") == "a\nb"
    assert shortened("a\n\n \n\nb\n\n\n") == "a ↵\nb"
    assert shortened("\n".join("abcdefgh")) == "a\nb\nc\nd\ne\nf ..."
    assert shortened("x" * 400) == "x" * 300 + " ..."


def test_an_example_shows_the_scores_of_the_metric_that_the_page_shows() -> None:
    answers = {"base": "so 2", "merged": "2 apples", "mine": "2.0"}
    scores = {"base": {"number": 1.0}, "merged": {"number": 0.0}, "mine": {"number": 0.25}}
    row = {"task": "sums", "input": "1+1=", "target": "2", "answers": answers, "scores": scores}
    lines = ["".join(one.itertext()) for one in ElementTree.fromstring(example(row, "number"))]
    assert lines[2:] == ["baseso 2 right", "merged2 apples wrong", "mine2.0 25.0 %"]
    first = row | {"scores": {"base": {"number": 0.5}, "merged": {"number": 0.5}}}
    assert telling_example([first, row], "number", "merged", ["base"])[1] == example(row, "number")


def test_text_never_becomes_markup() -> None:
    assert element("p", "a < b", Html("<b>c</b>"), title='"') == '<p title="&quot;">a &lt; b<b>c</b></p>'
    evil = "<script>"
    html = page(evil, note(evil), Table([Column(evil, str)], [[Line(evil, evil)]], evil).html())
    assert html.count("<script") == 1, "only our own"
    assert "<style>:root" in html.replace("\n", "")
