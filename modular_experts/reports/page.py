"""Write the page that shows results: a header, sections that each begin with a main finding, and how it was made."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from modular_experts.library.atomic import new_file
from modular_experts.reports.results import Facts, Results
from modular_experts.reports.tables import Html, element, folded, html_of, kept_together, page, percent

LONGEST = 300  # characters of a text in an example
MOST_LINES = 6  # and lines of it
MOST_OPEN = 3  # tasks whose answers are shown without a press

TestedRow = Facts
"""A test row with the answers of models to it, as `examples_of` makes it."""


class Section(NamedTuple):
    """A part of a page: its name in the table of contents, one sentence to take away as its heading, the evidence."""

    name: str
    takeaway: str
    parts: Sequence[Html]


def write_page(
    file: Path,
    results: Results,
    title: str,
    sections: Iterable[Section | None],
    about: Mapping[str, str],
    lede: Sequence[Html] = (),
) -> None:
    """Write a page that needs no other file.

    Args:
        file: The file of the page.
        results: All numbers, which the page holds as a file to save.
        title: The main finding, as the headline.
        sections: The parts of the page in order; None leaves one out.
        about: What the foot of the page tells beside the machine and the versions.
        lede: What stands under the headline.
    """
    facts = results.facts
    made_by = [f"modular-experts {facts['versions'].get('modular-experts', '')}", facts["date"]]
    eyebrow = element("p", " · ".join(filter(None, made_by)), class_="eyebrow")
    head = [eyebrow, element("h1", kept_together(title)), *lede, results.download()]
    links: list[Html] = []
    parts: list[Html] = []
    for section in sections:
        if section is None:
            continue
        slug = re.sub(r"[^a-z0-9]+", "-", section.name.lower()).strip("-")
        links.append(element("a", section.name, href=f"#{slug}"))
        heading = [element("p", section.name, class_="eyebrow"), element("h2", kept_together(section.takeaway))]
        parts.append(element("section", *heading, *section.parts, id=slug))
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    known = {**about, "machine": facts["machine"], "versions": versions}
    foot = html_of(element("div", element("dt", name), element("dd", text)) for name, text in known.items())
    contents = element("nav", *links, aria_label="Contents")
    text = page(title, element("header", *head), contents, *parts, element("footer", element("dl", foot)))
    with new_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def example(row: TestedRow, metric: str, models: Iterable[str] | None = None) -> Html:
    """Return a test row: its input, the wanted answer, and the answers of models, each with its score by a metric."""
    answers: Mapping[str, str] = row["answers"]
    lines = [_line("input", row["input"]), _line("wanted", row["target"])]
    for model in answers if models is None else [model for model in models if model in answers]:
        score = _score(row, model, metric)
        mark = {0.0: "wrong", 1.0: "right"}.get(score, f"{percent(score)} %")
        lines.append(_line(model, answers[model], mark))
    return element("dl", *lines, class_="example")


def _line(name: str, text: str, mark: str = "") -> Html:
    """Return a line of an example; a mark that is a word is the class of its line, too."""
    shown = element("code", shortened(text)) if text.strip() else element("em", "empty")
    marked = [element("span", f" {mark}")] if mark else []
    look = {"class_": mark} if mark.isalpha() else {}
    return element("div", element("dt", name), element("dd", shown, *marked), **look)


def shortened(text: str) -> str:
    """Return a text as an example shows it: its first lines and letters, and a sign in the place of empty lines."""
    lines = re.sub(r"\n(\s*\n)+", " ↵\n", text.rstrip()).split("\n")
    cut = "\n".join(lines[:MOST_LINES])
    if len(lines) > MOST_LINES or len(cut) > LONGEST:
        return f"{cut[:LONGEST]} ..."
    return cut


def _score(row: TestedRow, model: str, metric: str) -> float:
    """Return the score of an answer; without one, as for metrics that read no text, whether it is the wanted answer."""
    known = row.get("scores", {}).get(model, {}).get(metric)
    if known is None:
        return float(row["answers"][model].strip() == row["target"].strip())
    return float(known)


ModelsOf = Callable[[str], Sequence[str]] | None
"""Returns the models whose answers to rows of a task are shown; None shows all."""


def telling_example(
    rows: Sequence[TestedRow], metric: str, worse: str, compared: Sequence[str], models: ModelsOf = None
) -> list[Html]:
    """Return the row that tells most: the compared models differ most on it, and one of them beats the `worse` model.

    It is the first of several such rows, and without one the first of all.
    """

    def spread(row: TestedRow) -> tuple[float, float]:
        """Return how unlike the scores are, which is most where half of them are right, and how much the best gains."""
        scores = [_score(row, model, metric) for model in compared if model in row["answers"]]
        if worse not in row["answers"] or not scores:
            return (-1.0, -1.0)
        mean = sum(scores) / len(scores)
        gained = max(scores) - _score(row, worse, metric)
        return (sum((score - mean) ** 2 for score in scores) if gained > 0 else -1.0, gained)

    row = max(rows, key=spread)
    shown = example(row, metric, models(row["task"]) if models else None)
    return [element("p", f"One test row of {row['task']}:", class_="note"), shown]


def answers_section(rows: Sequence[TestedRow], metric: str, models: ModelsOf = None) -> Section:
    """Return a section with the answers to the first row of each task, which a press shows where there are many."""
    first: dict[str, TestedRow] = {}
    for row in rows:
        first.setdefault(row["task"], row)
    parts = []
    for task, row in first.items():
        named = [model for model in (models(task) if models else row["answers"]) if model in row["answers"]]
        shown = example(row, metric, named)
        if len(first) <= MOST_OPEN:
            parts.append(element("div", element("h3", task), shown))
        else:
            right = sum(_score(row, model, metric) == 1 for model in named)
            parts.append(folded(f"{task}: {right} of {len(named)} answers are right", shown))
    return Section("Answers", "Read what the models answer to one test row of each task", parts)
