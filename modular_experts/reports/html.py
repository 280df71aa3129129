"""Build HTML from Python values, as elements and as whole pages that need no other file, no script and no network.

`element` and `joined` escape text that is not `Html` already, so that no text can become markup. They close tags as in
XML, so that any XML parser can check a page.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape
from pathlib import Path

from modular_experts.reports.svg import COLOURS

HEAD = '<meta charset="utf-8" /><meta name="viewport" content="width=device-width, initial-scale=1" />'
STYLE = Path(__file__).with_name("page.css")


class Html(str):
    """Text that is HTML."""


def element(name: str, *children: str, **attributes: object) -> Html:
    """Return an element: children that are `Html` as they are, others escaped; the attribute `class_` is `class`."""
    shown = "".join(f' {key.rstrip("_")}="{escape(str(value))}"' for key, value in attributes.items())
    return Html(f"<{name}{shown}>{joined(children)}</{name}>")


def joined(parts: Iterable[str]) -> Html:
    """Return parts one after the other."""
    return Html("".join(part if isinstance(part, Html) else escape(part) for part in parts))


def page(title: str, *main: Html) -> str:
    """Return a whole page, in light and dark colours, for a desk and for a phone."""
    style = element("style", Html(STYLE.read_text(encoding="utf-8")))
    head = element("head", Html(HEAD), element("title", title), style)
    return f"<!DOCTYPE html>\n{element('html', head, element('body', element('main', *main)), lang='en')}\n"


def section(title: str, takeaway: str, *rest: Html) -> Html:
    """Return a section: its title, one sentence to take away, and the evidence."""
    return element("section", element("h2", title), element("p", _kept_together(takeaway)), *rest)


def note(text: str) -> Html:
    """Return a paragraph in small print, such as how a table was measured."""
    return element("p", _kept_together(text), class_="note")


def inline_svg(svg: str) -> Html:
    """Return a figure of `svg.py` for a page: without its own size, and in colours that the page may set."""
    svg = re.sub(r'(<svg [^>]*?)width="[^"]*" height="[^"]*" ', r"\1", svg[svg.index("<svg") :], count=1)
    for name, colour in COLOURS.items():
        svg = svg.replace(f": {colour}", f": var(--{name}, {colour})")
    return Html(svg)


def _kept_together(text: str) -> Html:
    """Return a text in which no line ends between a number and its unit."""
    return Html(joined([text]).replace(" %", "&#160;%").replace(" points", "&#160;points"))
