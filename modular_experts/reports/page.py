"""Write the page that shows results: a header, sections that each begin with a main finding, and how it was made."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from modular_experts.library.atomic import new_file
from modular_experts.reports.html import Html, element, joined, kept_together, page
from modular_experts.reports.results import Results

LONGEST = 300  # characters of a text in an example


class Section(NamedTuple):
    """A part of a page: its name in the table of contents, one sentence to take away as its heading, the evidence."""

    name: str
    takeaway: str
    parts: Sequence[Html]


def write_page(
    file: Path,
    results: Results,
    title: str,
    sections: Sequence[Section],
    about: Mapping[str, str],
    lede: Sequence[Html] = (),
) -> None:
    """Write a page that needs no other file, whole or not at all.

    The page holds the results as downloads. Their facts give the date, the machine and the versions, beside which the
    foot tells `about` by name. `lede` stands between the title and the sections.
    """
    facts = results.facts
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    made_by = " · ".join(
        filter(None, [f"modular-experts {facts['versions'].get('modular-experts', '')}", facts["date"]])
    )
    header = element(
        "header", element("p", made_by, class_="eyebrow"), element("h1", title), *lede, results.downloads()
    )
    links = [element("a", one.name, href=f"#{slug(one.name)}") for one in sections]
    shown = [
        element(
            "section",
            element("p", one.name, class_="eyebrow"),
            element("h2", kept_together(one.takeaway)),
            *one.parts,
            id=slug(one.name),
        )
        for one in sections
    ]
    known = {**about, "machine": facts["machine"], "versions": versions}
    foot = joined(element("div", element("dt", name), element("dd", text)) for name, text in known.items())
    contents = element("nav", *links, aria_label="Contents")
    text = page(title, header, contents, *shown, element("footer", element("dl", foot)))
    with new_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def slug(text: str) -> str:
    """Return a text as the id of a part of a page."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def example(row: Mapping[str, Any], models: Iterable[str] | None = None) -> Html:
    """Return a test row: its input, the wanted answer, and the answers of models, each marked as right or wrong."""
    answers = row["answers"]
    rows = [("input", row["input"], ""), ("wanted", row["target"], "")]
    for model in answers if models is None else [one for one in models if one in answers]:
        rows.append((model, answers[model], "right" if is_right(row, model) else "wrong"))
    shown = []
    for name, text, mark in rows:
        code = element("code", text if len(text) <= LONGEST else f"{text[:LONGEST]} ...")
        said = [code, element("span", f" {mark}")] if mark else [code]
        shown.append(element("div", element("dt", name), element("dd", *said), **({"class_": mark} if mark else {})))
    return element("dl", *shown, class_="example")


def is_right(row: Mapping[str, Any], model: str) -> bool:
    """Return whether a model's answer to a test row is the wanted one."""
    return bool(row["answers"][model].strip() == row["target"].strip())


def telling(rows: Sequence[Mapping[str, Any]], wrong: str, right: str) -> Mapping[str, Any]:
    """Return the first row that one model answers wrongly and another rightly; without such a row, the first of all."""
    both = [row for row in rows if {wrong, right} <= {*row["answers"]}]
    return next((row for row in both if is_right(row, right) and not is_right(row, wrong)), rows[0])


def answers_section(rows: Sequence[Mapping[str, Any]], models: Mapping[str, Sequence[str]] | None = None) -> Section:
    """Return the answers to the first test row of each task; `models` are those to show, by task."""
    first: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        first.setdefault(row["task"], row)
    shown = [
        element("div", element("h3", task), example(row, models[task] if models else None))
        for task, row in first.items()
        if models is None or task in models
    ]
    return Section("Answers", "Read what the models answer to one test row of each task", shown)
