"""Markup: HTML elements from Python values. What is not HTML already is escaped, so no text can become markup.

Tags are closed as in XML, so that a page can be checked by any XML parser. Pages are put together in `page.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

__all__ = ["Html", "element", "joined", "table"]


class Html(str):
    """Text that is HTML."""


def element(name: str, *children: str, **attributes: object) -> Html:
    """Return an element.

    Args:
        name: Its tag.
        children: What is in it: `Html` as it is, any other text escaped.
        attributes: Its attributes; `class_` is `class`.
    """
    shown = "".join(f' {key.rstrip("_")}="{escape(str(value))}"' for key, value in attributes.items())
    return Html(f"<{name}{shown}>{joined(children)}</{name}>")


def joined(parts: Iterable[str]) -> Html:
    """Return parts one after the other."""
    return Html("".join(part if isinstance(part, Html) else escape(part) for part in parts))


def table(head: Sequence[str], groups: Iterable[Sequence[Html]], over: Mapping[str, int] | None = None) -> Html:
    """Return a table that scrolls within its own box where the page is narrow.

    Args:
        head: What is over the columns.
        groups: The rows, those that belong together in one group.
        over: What is over several columns at once, and over how many.
    """
    spans = [element("th", title, scope="colgroup", colspan=span) for title, span in (over or {}).items()]
    above = [element("tr", *spans, class_="over")] if spans else []
    titles = element("tr", *[element("th", title, scope="col") for title in head])
    bodies = [element("tbody", *rows) for rows in groups]
    return element("div", element("table", element("thead", *above, titles), *bodies), class_="scroll", tabindex="0")
