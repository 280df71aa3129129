"""Draw a table of numbers as a heat map: the number is in each cell, and a tint shows it, which also reads in grey."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from modular_experts.reports.html import Html, element


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Mapping[tuple[str, str], float | None],
    show: Callable[[float], str],
    low_is_best: bool = False,
) -> Html:
    """Return a table with a row and a column for each name, in a box that scrolls where the page is narrow.

    The tint grows evenly from the worst value of the table, which has none, to the best one.

    Args:
        rows: Names of the rows.
        columns: Names of the columns.
        values: The value of each row and column; one that is missing, None or not finite leaves its cell without tint.
        show: Returns the text of a value.
        low_is_best: Whether the lowest value is the best.
    """
    known = [value for value in values.values() if value is not None and math.isfinite(value)]
    low, high = min(known, default=0.0), max(known, default=0.0)

    def cell(value: float | None) -> Html:
        if value is None:
            return element("td")
        if not math.isfinite(value) or low == high:
            return element("td", show(value))
        share = (high - value if low_is_best else value - low) / (high - low)
        return element("td", show(value), style=f"--heat: {100 * share:.0f}%")

    head = element("tr", element("th"), *[element("th", element("span", name), scope="col") for name in columns])
    body = [
        element("tr", element("th", row, scope="row"), *[cell(values.get((row, column))) for column in columns])
        for row in rows
    ]
    table = element("table", element("thead", head), element("tbody", *body), class_="heat")
    return element("div", table, class_="scroll", tabindex="0")
