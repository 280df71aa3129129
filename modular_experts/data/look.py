"""Look at the rows of tasks as `fit` reads them: tokens with the learned ones marked, lengths, repeated rows."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from textwrap import shorten

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from modular_experts.base import Base
from modular_experts.data.batch import IGNORED, Example
from modular_experts.data.chat import classifies
from modular_experts.data.mixture import TaskMixture
from modular_experts.data.row_tokenizer import RowTokenizer
from modular_experts.data.rows import OWN, SPLITS, Row, raise_for_bad_rows
from modular_experts.data.tasks import Task, Tasks, repeats
from modular_experts.injection.task_heads import class_name
from modular_experts.library.atomic import new_file
from modular_experts.places import check_free
from modular_experts.reports.tables import Column, Line, Table, element, page

SHOWN = 2
"""Rows of a task that are shown as tokens."""
LONGEST = 3
"""Rows of a task that are named as the longest."""
EDGE = 60
"""Tokens at each end of a shown row."""
KEY = "are learned; in a task that is only tested, they are measured."


@dataclass(frozen=True)
class LookedTask:
    """What there is to see of one task; a shown row has its place, and its tokens with whether each is learned."""

    name: str
    facts: Sequence[str]
    splits: Mapping[str, Mapping[str, int]]
    shown: Sequence[tuple[str, Sequence[tuple[str, bool]]]]

    @property
    def table(self) -> Table:
        columns = [Column(name, itemgetter(name)) for name in next(iter(self.splits.values()))]
        return Table(columns, [[Line(split, sizes) for split, sizes in self.splits.items()]], "tokens")


@dataclass(frozen=True)
class Look:
    """What there is to see of several tasks; it prints as text, and `write` makes a page."""

    tasks: Sequence[LookedTask]

    def __str__(self) -> str:
        parts = []
        for task in self.tasks:
            console = Console(width=80, file=io.StringIO(), color_system=None)
            console.print(task.table.text())
            table = "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]
            parts.append("\n".join([task.name, *(f"  {fact}" for fact in task.facts), "", table]))
            for place, tokens in task.shown:
                parts[-1] += f"\n\n{place}\n" + "".join(
                    f"[{text}]" if learned else f"{text}|" for text, learned in tokens
                )
        return "\n\n\n".join([*parts, f"The tokens in brackets {KEY}"])

    def write(self, file: str | Path) -> None:
        """Write the same as a page that needs no other file."""
        sections = []
        for task in self.tasks:
            parts = [element("ul", *[element("li", fact) for fact in task.facts]), task.table.html()]
            for place, tokens in task.shown:
                spans = [
                    element("span", text, class_="learned") if learned else element("span", text)
                    for text, learned in tokens
                ]
                parts += [element("p", place, class_="note"), element("pre", *spans, class_="tokens")]
            sections.append(element("section", element("h2", task.name), *parts))
        title = "The rows of the tasks"
        head = element("header", element("h1", title), element("p", f"The marked tokens {KEY}"))
        with new_file(Path(file)) as temporary:
            temporary.write_text(page(title, head, *sections), encoding="utf-8")


def look(
    base: str | Path | Base,
    tasks: Tasks | TaskMixture,
    page: str | Path | None = None,
    overwrite: bool = False,
    **reading: object,
) -> Look:
    """Read tasks as `fit` does, and return what there is to see; no model is loaded.

    Args:
        base: The base whose tokenizer and context are taken.
        tasks: Task files, tasks with settings, or a mixture of them.
        page: File of a page that shows the same.
        overwrite: Replace the page.
        reading: Further arguments of `TaskMixture`.

    Raises:
        FileExistsError: The page exists and may not be replaced.
        ValueError: A row is bad, or a target does not fit `max_length`.
    """
    if page is not None:
        page = check_free(page, overwrite)
    opened = base if isinstance(base, Base) else Base.open(base)
    data = tasks if isinstance(tasks, TaskMixture) else TaskMixture(tasks, **reading)  # type: ignore[arg-type]
    data.read_for(opened)
    rows = {split: data.rows(split) for split in SPLITS}
    looked = [_looked(task, {split: rows[split].get(task.name, []) for split in SPLITS}, data) for task in data.tasks]
    seen = Look(looked)
    if page is not None:
        seen.write(page)
    return seen


def _looked(task: Task, rows: Mapping[str, list[Row]], data: TaskMixture) -> LookedTask:
    tokenize = data.row_tokenizer()
    uncut = RowTokenizer(tokenize.tokenizer, 10**9, data.chat_template)
    splits: dict[str, Mapping[str, int]] = {}
    lengths: dict[str, int] = {}
    shown: list[tuple[str, list[tuple[str, bool]]]] = []
    for split, split_rows in rows.items():
        learn = split == "train"
        shown_before = data.demonstrations(task.name, split_rows)
        examples, cut, bad = tokenize(task.name, split_rows, learn, shown_before)
        raise_for_bad_rows(bad)
        whole = uncut(task.name, split_rows, learn, shown_before)[0] if cut else examples
        places = [f"{row.where} ({split})" for row in split_rows]
        sizes = [len(example.tokens.ids) for example in whole]
        lengths |= zip(places, sizes, strict=True)
        if sizes:
            sizes.sort()
            median, p95 = (sizes[int(share * (len(sizes) - 1) + 0.5)] for share in (0.5, 0.95))
            splits[split] = {"rows": len(sizes), "median": median, "p95": p95, "longest": sizes[-1], "cut": cut}
        for place, example in zip(places, examples[:SHOWN], strict=False):
            shown.append((place, _tokens(example, tokenize.tokenizer)))
    all_rows = [row for split_rows in rows.values() for row in split_rows]
    if not all_rows:
        raise ValueError(f"task {task.name!r} is held out and has no test rows; give some rows the split 'test'")
    side = "end" if classifies(tokenize.tokenizer) else "start"
    facts = [*_reading(task, all_rows[0], data), f"rows of at most {tokenize.limit}; a longer one loses its {side}"]
    if with_choices := [row for row in all_rows if row.choices]:
        such = shorten(" | ".join(with_choices[0].choices), 80)
        facts.append(f"{len(with_choices)} rows have choices to compare, or to prefer with `loss=DPO`: {such}")
    longest = sorted(lengths, key=lambda place: -lengths[place])[:LONGEST]
    facts.append("longest: " + ", ".join(f"{place} with {lengths[place]}" for place in longest))
    return LookedTask(task.name, [*facts, *repeats(all_rows)], splits, shown[:SHOWN])


def _reading(task: Task, row: Row, data: TaskMixture) -> list[str]:
    """Say which columns were taken, and whether the chat template, and why."""
    recognised = [sentence.partition(": ")[2] for sentence in data.said if sentence.startswith(f"{task.name}: '")]
    columns = f"{recognised[0] if recognised else OWN}, as the columns are called"
    if task.template is not None:
        columns = "the task names its template"
    elif task.columns:
        columns = "the task names its columns"
    if row.messages:
        chat = "by the tokenizer's chat template: rows are messages"
    elif data.chat_template:
        chat = "by the tokenizer's chat template: `chat_template=True` says so"
    else:
        has_template = data.row_tokenizer().tokenizer.chat_template is not None
        has = "has one (`chat_template=True` takes it)" if has_template else "has none"
        chat = f"without a chat template: rows are texts, and the tokenizer {has}"
    return [columns, chat]


def _tokens(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Return the text of each token, and whether it is learned; of a long row, the tokens at both ends."""
    learned = (example.tokens.labels != IGNORED).tolist()
    ids = example.tokens.ids.tolist()
    texts = [
        class_name(token) if learns and classifies(tokenizer) else _text(tokenizer, token)
        for token, learns in zip(ids, learned, strict=True)
    ]
    pairs = [(text.replace("\n", "\\n"), learns) for text, learns in zip(texts, learned, strict=True)]
    return pairs if len(pairs) <= 2 * EDGE else [*pairs[:EDGE], (" ... ", False), *pairs[-EDGE:]]


def _text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
