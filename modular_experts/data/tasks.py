"""Define a task: a named set of rows, their source, and their role."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from modular_experts.data.chat import warn_once
from modular_experts.data.rows import OWN, SPLITS, Row, RowForm, RowReader, recognise, template_fields
from modular_experts.data.sources import Record, TaskSource, Wanted, hub_records, path_records
from modular_experts.text import did_you_mean

ROLES = ("held_in", "held_out")
TRAINED = "are also training rows"
COLUMNS = ("input", "target", "messages", "tools", "split", "choices", "rejected")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Task:
    """One task, whose rows come from exactly one of `path`, `hub` and `source`.

    Rows are recognised by their columns, once for a task, and a line of the log says which columns were taken:

    | columns | input | target |
    |---|---|---|
    | `input`, `target` | the text of `input` | the text of `target` |
    | `prompt`, `completion` | the text of `prompt` | the text of `completion` |
    | `question`, `answer` | the text of `question` | the text of `answer` |
    | `instruction`, `output`, perhaps `input` | instruction, an empty line, input, a line end | the text of `output` |
    | `prompt` or `input`, `chosen`, `rejected` | the prompt | the text of `chosen`; `rejected` is another choice |
    | `messages` | a conversation, a list of {role, content} | each turn of the assistant |

    `input` and `target` beat every other form, and `columns` or `template` beat them all. In a row of two texts, one
    space goes before the target unless white space is there. A conversation and its `tools` go through the tokenizer's
    chat template; training learns each turn of the assistant, and validation and test measure the last.

    Args:
        name: Name of the task in results: up to 64 letters, digits, dots, dashes and underscores. Without one, it is
            the name of the file without its suffix, or the last part of the hub id.
        path: A .jsonl, .json, .csv, .tsv or .parquet file, or a directory written by `datasets.save_to_disk`.
        hub: The id of a dataset on the Hugging Face hub.
        subset: Configuration of the hub dataset.
        revision: Commit, tag or branch of the hub dataset.
        source: A `TaskSource` of your own.
        role: Training uses `held_in` tasks; `held_out` tasks are only for the test.
        columns: The data's names of columns: {input: text, target: label, messages: ..., split: ..., choices: ...}.
        where: Take only the rows with these values in these columns of the data, from a table of several tasks:
            {task_name: sciq_Multiple_Choice}.
        template: The input text, with columns in braces: "Question: {question} Answer:".
        choices: The possible targets of every row without `choices` of its own, for choice accuracy.
        weight: Factor on the task's share of the mixture.
        cap: The most rows of this task that one epoch may take; other rows come in later epochs.
    """

    name: str = ""
    path: str | None = None
    hub: str | None = None
    subset: str | None = None
    revision: str | None = None
    source: TaskSource | None = None
    role: Literal["held_in", "held_out"] = "held_in"
    columns: dict[str, str] = field(default_factory=dict)
    where: dict[str, str | int | float | bool] = field(default_factory=dict)
    template: str | None = None
    choices: list[str] = field(default_factory=list)
    weight: float = 1.0
    cap: int | None = None

    def __post_init__(self) -> None:
        place = self.path or self.hub
        if sum(place is not None for place in (self.path, self.hub, self.source)) != 1:
            raise ValueError(f"task {self.name!r} needs exactly one of `path`, `hub` and `source`")
        if place and self.name == "":
            # The only way to set a field of a frozen dataclass.
            object.__setattr__(self, "name", Path(place).stem if self.path else Path(place).name)
        if not isinstance(self.name, str) or not NAME.fullmatch(self.name):
            fitting = re.sub("[^A-Za-z0-9._-]+", "-", str(self.name)).strip("._-")[:64] or "mine"
            several = "," in str(place) and not Path(str(place)).exists()
            way = "separate files by spaces" if several else f"name the task: {{name: {fitting}, {self._origin}}}"
            raise ValueError(
                f"{self.name!r} cannot be the name of a task, which is up to 64 of A-Z a-z 0-9 . _ - and starts "
                f"with a letter or digit; {way}"
            )
        for setting, words, known in (("role", [self.role], ROLES), ("columns key", self.columns, COLUMNS)):
            for word in words:
                if word not in known:
                    near = did_you_mean(word, known)
                    raise ValueError(f"task {self.name!r}: {setting} {word!r} is not one of {', '.join(known)}{near}")
        for column, value in self.where.items():
            if not isinstance(value, str | int | float | bool):
                raise ValueError(f"task {self.name!r}: where {column!r} is one text or number, not {value!r}")
        if self.template is not None:
            template_fields(self.template)
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"task {self.name!r}: weight={self.weight} must be a positive number")
        if self.cap is not None and self.cap < 1:
            raise ValueError(f"task {self.name!r}: cap={self.cap} must be at least 1 row an epoch")

    @property
    def _origin(self) -> str:
        """The settings that tell where its rows come from, as a configuration has them."""
        settings = {"path": self.path, "hub": self.hub, "subset": self.subset}
        if self.source:
            settings["source"] = type(self.source).__name__
        return ", ".join(f"{key}: {value}" for key, value in settings.items() if value)

    @property
    def held_in(self) -> bool:
        """Whether training uses the task."""
        return self.role == "held_in"

    def read(
        self, targets: bool = True, report: Callable[[str], None] = lambda sentence: None
    ) -> tuple[list[Row], list[str]]:
        """Return the rows, and one sentence per bad row.

        Args:
            targets: Whether a row without a target is bad; only `predict` does without.
            report: Takes a sentence on the columns that were taken, if they are not `input` and `target`.

        Raises:
            ValueError: The file, directory or dataset is not there, has no row that `where` asks for, or has columns
                that nothing recognises.
        """
        try:
            place, records = self._records()
            form = OWN
            columns = self.columns
            if self.template is None and not {"input", "target", "messages"} & set(columns):
                form, records = _recognised(records)
                columns = {**form.columns, **columns}
                if form != OWN:
                    report(f"{self.name}: {form}")
            if "messages" in columns and self.choices:
                raise ValueError("choices are for rows of input and target, and these rows are conversations")
            rows, bad = RowReader(columns, self.template, self.choices, form.optional, targets).read(records)
            if not rows and not bad:
                bad = [f"{place}:1: the file is empty: it has no rows"]
            return rows, bad
        except ValueError as error:
            raise ValueError(f"task {self.name!r}: {error}") from error

    def _records(self) -> tuple[str, Iterator[Record]]:
        """Return the place of the records, and those that `where` asks for."""
        if self.path is not None:
            place = self.path
            records = path_records(place, self.where)
        elif self.hub is not None:
            place = self.hub
            records = hub_records(place, self.subset, self.revision, self.where)
        else:
            assert self.source is not None
            place = type(self.source).__name__
            records = (Record(f"{place}:{number}", values) for number, values in enumerate(self.source.rows(), 1))
        return place, _matching(place, records, self.where) if self.where else records


if TYPE_CHECKING:
    AnyTask = Task | Mapping[str, Any] | str | os.PathLike[str]
    Tasks = AnyTask | Iterable[AnyTask]
else:
    # What the command line may be given.
    Tasks = str | Task | list[Task | str]


def as_tasks(tasks: Tasks) -> list[Task]:
    """Return the tasks; a path, or a mapping of a task's settings, becomes a `Task`."""
    by_name: dict[str, Task] = {}
    for task in map(_as_task, [tasks] if isinstance(tasks, Task | Mapping | str | os.PathLike) else tasks):
        if task.name in by_name:
            raise ValueError(
                f"two tasks have the name {task.name!r} ({by_name[task.name]._origin} and {task._origin}); results are "
                f"kept by name, so name one of them: {{name: {task.name}-2, {task._origin}}}"
            )
        by_name[task.name] = task
    if not by_name:
        raise ValueError("no tasks were given; a task is at least the path of its file, such as intents.jsonl")
    return list(by_name.values())


def _as_task(task: "AnyTask") -> Task:
    if isinstance(task, Task):
        return task
    if not isinstance(task, Mapping):
        return Task(path=os.fspath(task))
    known = [entry.name for entry in fields(Task)]
    for key in task:
        if key not in known:
            raise ValueError(f"a task has no {key!r}; it has {', '.join(known)}{did_you_mean(key, known)}")
    return Task(**task)


def _recognised(records: Iterator[Record]) -> tuple[RowForm, Iterator[Record]]:
    """Return the form of rows by the columns of the first hundred records, and all records."""
    first = list(islice(records, 100))
    names = [str(name) for record in first if isinstance(record.values, Mapping) for name in record.values]
    return recognise(list(dict.fromkeys(names))) if names else OWN, chain(first, records)


def _matching(place: str, records: Iterable[Record], where: Wanted) -> Iterator[Record]:
    """Yield the records with the wanted values in their columns, and the records that could not be read."""
    seen: dict[str, set[str]] = {column: set() for column in where}
    any_fits = False
    for record in records:
        fits = True
        if record.problem is None and isinstance(record.values, Mapping):
            for column, wanted in where.items():
                value = record.values.get(column)
                if value is not None:
                    seen[column].add(str(value))
                if value is None or str(value) != str(wanted):
                    fits = False
                    break
        if fits:
            any_fits = True
            yield record
    if not any_fits:
        column = next(column for column in where if str(where[column]) not in seen[column])
        held = sorted(seen[column])
        listed = ", ".join(map(repr, held[:5])) + (", ..." if len(held) > 5 else "") or "missing"
        near = did_you_mean(str(where[column]), held)
        raise ValueError(f"{place}: no row fits `where`; {column!r} is not {str(where[column])!r} but {listed}{near}")


def fill_splits(rows: Sequence[Row], validation_ratio: float, test_ratio: float, seed: int, held_in: bool) -> list[Row]:
    """Give every row without a split one, and keep the order of the rows.

    All such rows of a held-out task are test rows, and so are rows without a target. In a held-in task, the ratios are
    rounded, to at least one row for a ratio above zero if there are three rows.
    """

    def digest(index: int) -> bytes:
        return blake2b(f"{seed}\0{rows[index].input}".encode(), digest_size=16).digest()

    rows = [replace(row, split="test") if row.target is None and row.split is None else row for row in rows]
    unsplit = [index for index, row in enumerate(rows) if row.split is None]
    shuffled = sorted(unsplit, key=lambda index: (digest(index), index))
    test, validation = (
        max(int(ratio > 0 and len(unsplit) >= 3), int(len(unsplit) * ratio + 0.5))
        for ratio in ((test_ratio, validation_ratio) if held_in else (1.0, 0.0))
    )
    divided = list(rows)
    for place, index in enumerate(shuffled):
        split = "test" if place < test else "validation" if place < test + validation else "train"
        divided[index] = replace(rows[index], split=split)
    return divided


def repeats(rows: Sequence[Row]) -> list[str]:
    """Count the rows of each split that repeat an earlier one of it, and those that are also training rows."""
    by_split = {split: [(row.input, row.target) for row in rows if row.split == split] for split in SPLITS}
    sentences = []
    trained = {*by_split["train"]}
    also_trained = []
    for split, texts in by_split.items():
        count = f"of {len(texts)} {split} rows"
        repeated = len(texts) - len({*texts})
        if repeated:
            sentences.append(f"{repeated} {count} repeat an earlier one")
        copies = sum(text in trained for text in texts)
        if copies and split != "train":
            also_trained.append(f"{copies} {count}")
    if also_trained:
        sentences.append(f"{' and '.join(also_trained)} {TRAINED}")
    return sentences


def warn_of_repeats(task: str, rows: Sequence[Row]) -> None:
    """Warn, once in a process, of validation and test rows that are also training rows."""
    for sentence in repeats(rows):
        if sentence.endswith(TRAINED):
            advice = "remove the copies, or give all copies of a row one `split`"
            warn_once(f"{task}: {sentence}, which an expert may know by heart; {advice}")
