"""Tables by columns: a column is a title and a function of a line's rows, and every line is shown by all columns.

To add a column to a report, add a `Column` to its list; the terminal and the page both show it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import rich.table
from rich.markup import escape

from modular_experts.reports.html import Html, element

__all__ = ["Column", "Line", "Table", "listed", "number", "percent", "points", "share", "times"]

NAME_WIDTH = 25  # so that a name and eight short columns fit 80 characters; longer names are folded, not cut


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Args:
        title: What stands over it.
        of: Returns a cell's value from the rows of its line; None leaves the cell empty.
        show: Makes text of the value.
        bar: Whether a bar under the cell shows its value, a share between 0 and 1 (on pages).
        over: What stands over this column and its neighbours that have the same.
        left: Whether the text starts on the left.
    """

    title: str
    of: Callable[[Any], Any]
    show: Callable[[Any], str] = str
    bar: bool = False
    over: str = ""
    left: bool = False


@dataclass(frozen=True)
class Line:
    """A line of a table.

    Args:
        name: What stands at its start.
        rows: What the columns take their values from, such as the `Results` of one model.
        strong: Whether it is printed bold: the head of a group, or a mean.
        key: CSS classes of a mark before the name, such as `key overlap`.
    """

    name: str
    rows: Any
    strong: bool = False
    key: str = ""


@dataclass(frozen=True)
class Table:
    """Lines in groups, each shown by all columns.

    Args:
        columns: The columns, without that of the names.
        groups: The lines, those that belong together in one group.
    """

    columns: Sequence[Column]
    groups: Sequence[Sequence[Line]]

    def text(self, name: str = "", title: str | None = None) -> rich.table.Table:
        """Return the table for a terminal.

        Args:
            name: What stands over the names.
            title: A headline.
        """
        table = rich.table.Table(
            box=None, pad_edge=False, padding=(0, 2, 0, 0), title=title, title_justify="left", title_style="bold"
        )
        table.add_column(name, max_width=NAME_WIDTH, overflow="fold")
        for column in self.columns:
            heading = f"{column.over}\n{column.title}" if column.over else column.title
            table.add_column(heading, justify="left" if column.left else "right", no_wrap=True)
        for number, group in enumerate(self.groups):
            if number:
                table.add_row()
            for line in group:
                table.add_row(escape(line.name), *self._cells(line), style="bold" if line.strong else None)
        return table

    def html(self, name: str = "") -> Html:
        """Return the table as HTML, in a box of its own that scrolls where the page is narrow.

        Args:
            name: What stands over the names.
        """
        head = [
            element("tr", *[element("th", title, scope="col") for title in [name, *[c.title for c in self.columns]]])
        ]
        if any(column.over for column in self.columns):
            spans = [(over, len(list(columns))) for over, columns in groupby(column.over for column in self.columns)]
            over = [element("th", title, scope="colgroup", colspan=span) for title, span in [("", 1), *spans]]
            head.insert(0, element("tr", *over, class_="over"))
        bodies = [element("tbody", *[self._row(line) for line in group]) for group in self.groups]
        return element("div", element("table", element("thead", *head), *bodies), class_="scroll", tabindex="0")

    def _cells(self, line: Line) -> list[str]:
        values = [(column, column.of(line.rows)) for column in self.columns]
        return ["" if value is None else escape(column.show(value)) for column, value in values]

    def _row(self, line: Line) -> Html:
        name = element("span", line.name, class_=line.key) if line.key else line.name
        cells = [element("th", name, scope="row")]
        for column in self.columns:
            value = column.of(line.rows)
            if value is None:
                cells.append(element("td"))
            elif column.bar:
                cells.append(element("td", column.show(value), class_="bar", style=f"--share: {100 * value:.1f}%"))
            else:
                cells.append(element("td", column.show(value)))
        return element("tr", *cells, class_="kind") if line.strong else element("tr", *cells)


def percent(share: float) -> str:
    """Return a score in per cent, such as `55.6`."""
    return number(100 * share, 1)


def points(difference: float) -> str:
    """Return the size of a difference of two shares, such as `2.1 points`."""
    return f"{abs(100 * difference):.1f} points"


def share(value: float) -> str:
    """Return a share in per cent, such as `5 %` or `5.45 %`."""
    return f"{100 * value:.3g} %"


def number(value: float, digits: int) -> str:
    """Return a number with a fixed number of digits, or a dash for one that is not finite."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


def times(scale: float) -> str:
    """Return a factor, such as `×0.75`."""
    return f"\N{MULTIPLICATION SIGN}{scale:g}"


def listed(words: Sequence[str]) -> str:
    """Return words as a sentence lists them: `a, b and c`."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
