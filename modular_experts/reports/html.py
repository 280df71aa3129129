"""Build HTML from Python values, as elements and as whole pages that need no other file and no network.

`element` and `joined` escape text that is not `Html` already, so that no text can become markup. They close tags as in
XML, so that any XML parser can check a page.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from modular_experts.reports.svg import COLOURS

HEAD = '<meta charset="utf-8" /><meta name="viewport" content="width=device-width, initial-scale=1" />'
LONGEST = 300  # characters of a text in an example
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


class Section(NamedTuple):
    """A part of a page: its name in the table of contents, one sentence to take away as its heading, the evidence."""

    name: str
    takeaway: str
    parts: Sequence[Html]


def report(
    title: str, header: Sequence[Html], sections: Sequence[Section], facts: Mapping[str, str], *more: Html
) -> str:
    """Return a page of a header, a table of contents, sections, facts about how it was made, and `more` after them."""
    links = [element("a", part.name, href=f"#{slug(part.name)}") for part in sections]
    parts = [
        element(
            "section",
            element("p", part.name, class_="eyebrow"),
            element("h2", kept_together(part.takeaway)),
            *part.parts,
            id=slug(part.name),
        )
        for part in sections
    ]
    known = joined(element("div", element("dt", name), element("dd", text)) for name, text in facts.items())
    contents = element("nav", *links, aria_label="Contents")
    return page(title, element("header", *header), contents, *parts, element("footer", element("dl", known)), *more)


def example(given: str, wanted: str, answers: Mapping[str, str]) -> Html:
    """Return one row of a task: its input, the wanted answer, and what each model answers, marked as right or wrong."""
    rows = [("input", given, ""), ("wanted", wanted, "")]
    rows += [(name, text, "right" if text.strip() == wanted.strip() else "wrong") for name, text in answers.items()]
    shown = []
    for name, text, mark in rows:
        code = element("code", text if len(text) <= LONGEST else f"{text[:LONGEST]} ...")
        said = [code, element("span", f" {mark}")] if mark else [code]
        shown.append(element("div", element("dt", name), element("dd", *said), **({"class_": mark} if mark else {})))
    return element("dl", *shown, class_="example")


def script() -> Html:
    """Return a script for the end of a page, by which headings sort tables and downloads come unpacked.

    The page reads as well without it.
    """
    return element("script", Html(SCRIPT.read_text(encoding="utf-8")))


def slug(text: str) -> str:
    """Return a text as the id of a part of a page."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def page(title: str, *main: Html) -> str:
    """Return a whole page, in light and dark colours, for a desk and for a phone."""
    style = element("style", Html(STYLE.read_text(encoding="utf-8")))
    head = element("head", Html(HEAD), element("title", title), style)
    return f"<!DOCTYPE html>\n{element('html', head, element('body', element('main', *main)), lang='en')}\n"


def note(text: str) -> Html:
    """Return a paragraph in small print, such as how a table was measured."""
    return element("p", kept_together(text), class_="note")


def inline_svg(svg: str, prefix: str = "") -> Html:
    """Return a figure of `svg.py` for a page: without its own size, and in colours that the page may set.

    Each of several figures on a page needs a prefix of its own, so that no id comes twice.
    """
    svg = re.sub(r'(\bid="|href="#|url\(#|(?:aria-labelledby="|(?<=-title) )(?=figure-))', rf"\g<1>{prefix}", svg)
    svg = re.sub(r'(<svg [^>]*?)width="[^"]*" height="[^"]*" ', r"\1", svg[svg.index("<svg") :], count=1)
    for name, colour in COLOURS.items():
        svg = svg.replace(f": {colour}", f": var(--{name}, {colour})")
    return Html(svg)


def kept_together(text: str) -> Html:
    """Return a text in which no line ends between a number and its unit."""
    return Html(joined([text]).replace(" %", "&#160;%").replace(" points", "&#160;points"))
