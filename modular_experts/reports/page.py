"""Write the page that shows results: a header, sections that each begin with a main finding, and how it was made."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from modular_experts.library.atomic import new_file
from modular_experts.reports.results import Results
from modular_experts.reports.tables import Html, element, joined, kept_together, page, percent

LONGEST = 300  # characters of a text in an example


class Section(NamedTuple):
    """A part of a page: its name in the table of contents, one sentence to take away as its heading, the evidence."""

    name: str
    takeaway: str
    parts: Sequence[Html]


def write_page(
    file: Path,
    results: Results,
    sections: Sequence[Section | None],
    about: Mapping[str, str],
    lede: Sequence[Html] = (),
) -> None:
    shown = results.where(metric=results.main_metric)
    counts = [(len(shown.values(column)), column) for column in ("model", "task")]
    title = " on ".join(f"{count} {column}{'s' * (count != 1)}" for count, column in counts)
    facts = results.facts
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    made_by = " · ".join(
        filter(None, [f"modular-experts {facts['versions'].get('modular-experts', '')}", facts["date"]])
    )
    head = [element("p", made_by, class_="eyebrow"), element("h1", title), *lede, results.download()]
    links, parts = [], []
    for one in filter(None, sections):
        slug = re.sub(r"[^a-z0-9]+", "-", one.name.lower()).strip("-")
        links.append(element("a", one.name, href=f"#{slug}"))
        heading = [element("p", one.name, class_="eyebrow"), element("h2", kept_together(one.takeaway))]
        parts.append(element("section", *heading, *one.parts, id=slug))
    known = {**about, "machine": facts["machine"], "versions": versions}
    foot = joined(element("div", element("dt", name), element("dd", text)) for name, text in known.items())
    contents = element("nav", *links, aria_label="Contents")
    text = page(title, element("header", *head), contents, *parts, element("footer", element("dl", foot)))
    with new_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def example(row: Mapping[str, Any], metric: str, models: Iterable[str] | None = None) -> Html:
    """Return a test row: its input, the wanted answer, and the answers of models, each with its score by a metric."""
    answers = row["answers"]
    rows = [("input", row["input"], ""), ("wanted", row["target"], "")]
    for model in answers if models is None else [one for one in models if one in answers]:
        score = _score(row, model, metric)
        rows.append((model, answers[model], {0.0: "wrong", 1.0: "right"}.get(score, f"{percent(score)} %")))
    shown = []
    for name, text, mark in rows:
        code = element("code", text if len(text) <= LONGEST else f"{text[:LONGEST]} ...")
        code = code if text.strip() else element("em", "empty")
        said = [code, element("span", f" {mark}")] if mark else [code]
        shown.append(
            element("div", element("dt", name), element("dd", *said), **({"class_": mark} if mark.isalpha() else {}))
        )
    return element("dl", *shown, class_="example")


def _score(row: Mapping[str, Any], model: str, metric: str) -> float:
    """Return the score of an answer; without one, as for metrics that read no text, whether it is the wanted answer."""
    found = row.get("scores", {}).get(model, {}).get(metric)
    return float(row["answers"][model].strip() == row["target"].strip()) if found is None else found


Models = Callable[[str], Sequence[str]] | None
"""Returns the models whose answers to rows of a task are shown; None shows all."""


def telling_example(
    rows: Sequence[Mapping[str, Any]], metric: str, worse: str, better: str, models: Models = None
) -> list[Html]:
    """Return the first row that one model answers better than another, or else the first of all."""
    both = [row for row in rows if {worse, better} <= {*row["answers"]}]
    row = next((row for row in both if _score(row, better, metric) > _score(row, worse, metric)), rows[0])
    shown = example(row, metric, models(row["task"]) if models else None)
    return [element("p", f"One test row of {row['task']}:", class_="note"), shown]


def answers_section(rows: Sequence[Mapping[str, Any]], metric: str, models: Models = None) -> Section:
    first: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        first.setdefault(row["task"], row)
    answers = {task: example(row, metric, models(task) if models else None) for task, row in first.items()}
    shown = [element("div", element("h3", task), one) for task, one in answers.items()]
    return Section("Answers", "Read what the models answer to one test row of each task", shown)
