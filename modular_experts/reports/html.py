"""Build HTML from Python values, as elements and as whole pages that need no other file and no network.

`element` and `joined` escape text that is not `Html` already, so that no text can become markup. They close tags as in
XML, so that any XML parser can check a page.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path

HEAD = '<meta charset="utf-8" /><meta name="viewport" content="width=device-width, initial-scale=1" />'
STYLE, SCRIPT = (Path(__file__).with_name(name) for name in ("page.css", "page.js"))


class Html(str):
    """Text that is HTML."""


def element(name: str, *children: str, **attributes: object) -> Html:
    """Return an element: children that are `Html` as they are, others escaped; `class_` is `class`, and `_` is `-`."""
    shown = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"' for key, value in attributes.items())
    return Html(f"<{name}{shown}>{joined(children)}</{name}>")


def joined(parts: Iterable[str]) -> Html:
    """Return parts one after the other."""
    return Html("".join(part if isinstance(part, Html) else escape(part) for part in parts))


def page(title: str, *main: Html) -> str:
    """Return a whole page, in light and dark colours, for a desk and for a phone.

    By its script, headings sort tables and downloads come unpacked; the page reads as well without it.
    """
    style = element("style", Html(STYLE.read_text(encoding="utf-8")))
    head = element("head", Html(HEAD), element("title", title), style)
    script = element("script", Html(SCRIPT.read_text(encoding="utf-8")))
    return f"<!DOCTYPE html>\n{element('html', head, element('body', element('main', *main), script), lang='en')}\n"


def note(text: str) -> Html:
    """Return a paragraph in small print, such as how a table was measured."""
    return element("p", kept_together(text), class_="note")


def kept_together(text: str) -> Html:
    """Return a text in which no line ends between a number and its unit."""
    return Html(joined([text]).replace(" %", "&#160;%").replace(" points", "&#160;points"))
