"""Show tables in a terminal and on a page: a column is a title and a function of a line's rows.

HTML is built from elements, whose text is escaped unless it is `Html` already, so that any XML parser can check a page.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape as escape_html
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

import rich.table
from rich.markup import escape

HEAD = '<meta charset="utf-8" /><meta name="viewport" content="width=device-width, initial-scale=1" />'
STYLE = Path(__file__).with_name("page.css")
SCRIPT = Path(__file__).with_name("page.js")
NAME_WIDTH = 25  # so that a name and eight short columns fit 80 characters; longer names are folded, not cut


class Html(str):
    """Text that is HTML."""


def element(name: str, *children: str, **attributes: object) -> Html:
    """Return an element: children that are `Html` as they are, others escaped; `class_` is `class`, and `_` is `-`."""
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape_html(str(value))}"' for key, value in attributes.items()
    )
    return Html(f"<{name}{shown}>{html_of(children)}</{name}>")


def html_of(parts: Iterable[str]) -> Html:
    return Html("".join(part if isinstance(part, Html) else escape_html(part) for part in parts))


def page(title: str, *main: Html) -> str:
    """Return a whole page that needs no other file, in light and dark colours, for a desk and for a phone."""
    style = element("style", Html(STYLE.read_text(encoding="utf-8")))
    head = element("head", Html(HEAD), element("title", title), style)
    script = element("script", Html(SCRIPT.read_text(encoding="utf-8")))
    return f"<!DOCTYPE html>\n{element('html', head, element('body', element('main', *main), script), lang='en')}\n"


def note(text: str) -> Html:
    return element("p", kept_together(text), class_="note")


def folded(title: str, *parts: Html) -> Html:
    """Return parts of a page that a press on their title shows."""
    return element("details", element("summary", kept_together(title)), *parts)


def kept_together(text: str) -> Html:
    return Html(html_of([text]).replace(" %", "&#160;%").replace(" points", "&#160;points"))


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    title: str
    of: Callable[[Any], Any]  # a cell's value from the rows of its line; None leaves the cell empty
    show: Callable[[Any], str] = str  # the text of the value
    bar: bool = False  # on pages: whether a bar under the cell shows the value, a share between 0 and 1
    over: str = ""  # a heading over this column and its neighbours that have the same
    left: bool = False  # whether the text starts on the left
    # Which value of a group of lines is marked as its best on a page, or whether a line's value is.
    best: Literal["", "high", "low"] | Callable[[Any], bool] = ""
    # Whether a line's value is underlined on a page, such as a score on a model's own task.
    underlined: Callable[[Any], bool] | None = None


@dataclass(frozen=True)
class Line:
    """A line of a table."""

    name: str
    rows: Any  # what the columns read, such as the `Results` of one model
    strong: bool = False  # bold: the head of a group, or a mean


class Cell(NamedTuple):
    """The value of a column in a line, and its text."""

    column: Column
    value: Any
    text: str


@dataclass(frozen=True)
class Table:
    """Lines in groups, each shown by all columns, with a heading over their names."""

    columns: Sequence[Column]
    groups: Sequence[Sequence[Line]]
    name: str = ""

    def text(self) -> rich.table.Table:
        """Return the table for a terminal."""
        table = rich.table.Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(escape(self.name), max_width=NAME_WIDTH, overflow="fold")
        for column in self.columns:
            heading = f"{column.over}\n{column.title}" if column.over else column.title
            table.add_column(escape(heading), justify="left" if column.left else "right", no_wrap=True)
        for number, group in enumerate(self.groups):
            if number:
                table.add_row()
            for line in group:
                texts = [escape(cell.text) for cell in self._cells(line)]
                table.add_row(escape(line.name), *texts, style="bold" if line.strong else None)
        return table

    def html(self) -> Html:
        """Return the table as HTML, in a box of its own that scrolls where the page is narrow."""
        titles = [self.name, *[column.title for column in self.columns]]
        head = [element("tr", *[element("th", title, scope="col") for title in titles])]
        if any(column.over for column in self.columns):
            spans = [(over, len(list(columns))) for over, columns in groupby(column.over for column in self.columns)]
            over = [element("th", title, scope="colgroup", colspan=span) for title, span in [("", 1), *spans]]
            head.insert(0, element("tr", *over, class_="over"))
        bodies = []
        for group in self.groups:
            cells = [self._cells(line) for line in group]
            best = [id(cell) for of_column in zip(*cells, strict=True) for cell in _best(of_column)]
            rows = [self._row(line, own, best) for line, own in zip(group, cells, strict=True)]
            bodies.append(element("tbody", *rows))
        return element("div", element("table", element("thead", *head), *bodies), class_="scroll", tabindex="0")

    def _cells(self, line: Line) -> list[Cell]:
        values = [(column, column.of(line.rows)) for column in self.columns]
        return [Cell(column, value, "" if value is None else column.show(value)) for column, value in values]

    def _row(self, line: Line, cells: Sequence[Cell], best: Collection[int]) -> Html:
        shown = [element("th", line.name, scope="row")]
        for cell in cells:
            looks: dict[str, str] = {}
            kinds = []
            if cell.column.bar and cell.text:
                looks["style"] = f"--share: {100 * cell.value:.1f}%"
                kinds.append("bar")
            if id(cell) in best or (callable(cell.column.best) and cell.column.best(line.rows)):
                kinds.append("best")
            text = cell.text
            if cell.column.underlined and cell.column.underlined(line.rows):
                text = element("u", cell.text)
            if kinds:
                looks["class_"] = " ".join(kinds)
            shown.append(element("td", text, **looks))
        return element("tr", *shown, **({"class_": "kind"} if line.strong else {}))


def _best(cells: Iterable[Cell]) -> list[Cell]:
    """Return the cells with the best value, all that look like it; of cells that all look alike, none."""
    compared = [cell for cell in cells if isinstance(cell.column.best, str) and cell.column.best and cell.text]
    compared = [cell for cell in compared if math.isfinite(cell.value)]
    if len({cell.text for cell in compared}) < 2:
        return []
    choose = max if compared[0].column.best == "high" else min
    best = choose(compared, key=lambda cell: cell.value)
    return [cell for cell in compared if cell.text == best.text]


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Mapping[tuple[str, str], float | None],
    show: Callable[[float], str],
    low_is_best: bool = False,
    ends: tuple[float, float] | None = None,
) -> Html:
    """Return a table of one number a cell, whose tint grows evenly with the value, or falls where `low_is_best`.

    The tint goes from one of the `ends` to the other, by default from the lowest value to the highest.
    """
    known = [value for value in values.values() if value is not None and math.isfinite(value)]
    low, high = ends or (min(known, default=0.0), max(known, default=0.0))

    def cell(value: float | None) -> Html:
        if value is None:
            return element("td")
        if not math.isfinite(value) or low == high:
            return element("td", show(value))
        share = min(1.0, max(0.0, (value - low) / (high - low)))
        heat = 1.0 - share if low_is_best else share
        return element("td", show(value), style=f"--heat: {100 * heat:.0f}%")

    head = element("tr", element("th"), *[element("th", element("span", name), scope="col") for name in columns])
    body = [
        element("tr", element("th", row, scope="row"), *[cell(values.get((row, column))) for column in columns])
        for row in rows
    ]
    table = element("table", element("thead", head), element("tbody", *body), class_="heat")
    return element("div", table, class_="scroll page-wide", tabindex="0")


def percent(share: float) -> str:
    """Return a score in per cent, such as `55.6`."""
    return number_text(100 * share, 1)


def number_text(value: float, digits: int) -> str:
    """Return a number with a fixed number of digits, or a dash for one that is not finite."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


def listed(words: Sequence[str]) -> str:
    """Return words as a sentence lists them: `a, b and c`."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
