"""Define a task: a named set of rows, their source, and their role.

A configuration can spell a task: `{name: intents, path: data/intents.jsonl, role: held_out}`. `matching` takes one
task's records out of a table of several, and `fill_splits` divides rows without a split.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from hashlib import blake2b
from typing import Any, Literal

from modular_experts.data.rows import Row, RowReader, template_fields
from modular_experts.data.sources import Record, TaskSource, Wanted, hub_records, path_records, source_records
from modular_experts.text import did_you_mean

__all__ = ["Task", "as_tasks", "fill_splits", "matching"]

ROLES = ("held_in", "held_out")
COLUMNS = ("input", "target", "split", "choices")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Task:
    """One task, whose rows come from exactly one of `path`, `hub` and `source`.

    Args:
        name: Name of the task in results: up to 64 letters, digits, dots, dashes and underscores.
        path: A .jsonl, .json, .csv, .tsv or .parquet file, or a directory written by `datasets.save_to_disk`.
        hub: The id of a dataset on the Hugging Face hub.
        subset: Configuration of the hub dataset.
        revision: Commit, tag or branch of the hub dataset.
        source: A `TaskSource` of your own.
        role: Training uses `held_in` tasks; `held_out` tasks are only for the test.
        columns: The data's names of columns: {input: question, target: answer, split: ..., choices: ...}.
        where: Take only the rows with these values in these columns of the data, from a table of several tasks:
            {task_name: sciq_Multiple_Choice}.
        template: The input text, with columns in braces: "Question: {question} Answer:".
        choices: The possible targets of every row without `choices` of its own, for choice accuracy.
        weight: Factor on the task's share of the mixture.
        cap: The most rows of this task that one epoch may take; other rows come in later epochs.
    """

    name: str
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
        if not isinstance(self.name, str) or not NAME.fullmatch(self.name):
            raise ValueError(
                f"a task name is up to 64 of A-Z a-z 0-9 . _ - and starts with a letter or digit, not {self.name!r}"
            )
        if sum(place is not None for place in (self.path, self.hub, self.source)) != 1:
            raise ValueError(
                f"task {self.name!r} needs exactly one of `path`, `hub` and `source`, the place of its rows"
            )
        self._check_word("role", self.role, ROLES)
        for key in self.columns:
            self._check_word("columns key", key, COLUMNS)
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
    def held_in(self) -> bool:
        """Whether training uses the task."""
        return self.role == "held_in"

    def read(self) -> tuple[list[Row], list[str]]:
        """Return the rows, and one sentence per bad row.

        Raises:
            ValueError: The file, directory or dataset is not there, or has no row that `where` asks for.
        """
        try:
            return RowReader(self.columns, self.template, self.choices).read(self._records())
        except ValueError as error:
            raise ValueError(f"task {self.name!r}: {error}") from error

    def _records(self) -> Iterator[Record]:
        place, records = self._all_records()
        return matching(place, records, self.where) if self.where else records

    def _all_records(self) -> tuple[str, Iterator[Record]]:
        if self.path is not None:
            return self.path, path_records(self.path, self.where)
        if self.hub is not None:
            return self.hub, hub_records(self.hub, self.subset, self.revision, self.where)
        assert self.source is not None
        return type(self.source).__name__, source_records(self.source)

    def _check_word(self, what: str, word: str, known: Sequence[str]) -> None:
        if word not in known:
            raise ValueError(
                f"task {self.name!r}: {what} {word!r} is not one of {', '.join(known)}{did_you_mean(word, known)}"
            )


def as_tasks(tasks: Iterable[Task | Mapping[str, Any]]) -> list[Task]:
    """Return the tasks; a mapping becomes a `Task`.

    Raises:
        ValueError: There are no tasks, a name comes twice, or a mapping has an unknown key or no name.
    """
    made = []
    known = [entry.name for entry in fields(Task)]
    for task in tasks:
        if not isinstance(task, Task):
            for key in task:
                if key not in known:
                    raise ValueError(f"a task has no {key!r}; it has {', '.join(known)}{did_you_mean(key, known)}")
            if "name" not in task:
                raise ValueError(f"a task needs a name, and {dict(task)!r} has none")
            task = Task(**task)
        made.append(task)
    if not made:
        raise ValueError("no tasks were given; a task is at least {name: intents, path: intents.jsonl}")
    names = [task.name for task in made]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"the task name {twice[0]!r} is given {names.count(twice[0])} times; results are kept by name, so rename"
        )
    return made


_NAMED = 5


def matching(place: str, records: Iterable[Record], where: Wanted) -> Iterator[Record]:
    """Yield the records with the wanted values in their columns, and those that could not be read.

    Args:
        place: The source of the records, for the error's sentence.
        records: All records of the table.
        where: The wanted value of each named column.

    Raises:
        ValueError: There is no such record; the sentence lists what the columns hold instead.
    """
    seen: dict[str, set[str]] = {column: set() for column in where}
    names: set[str] = set()
    found = False
    for record in records:
        if record.problem is None and isinstance(record.values, Mapping):
            names.update(map(str, record.values))
            if not _holds(record.values, where, seen):
                continue
        found = True
        yield record
    if not found:
        raise ValueError(f"{place}: {_nothing(where, seen, names)}")


def _holds(values: Mapping[str, object], where: Wanted, seen: Mapping[str, set[str]]) -> bool:
    """Compare column by column up to the first that differs; `seen` collects the values of each column."""
    for column, wanted in where.items():
        if values.get(column) is None:
            return False
        seen[column].add(str(values[column]))
        if str(values[column]) != str(wanted):
            return False
    return True


def _nothing(where: Wanted, seen: Mapping[str, set[str]], names: set[str]) -> str:
    """Return which wanted column or value is missing, and what there is."""
    earlier: list[str] = []
    for column, wanted in where.items():
        if column not in names:
            return f"`where` names the column {column!r}, and the rows have only {_some(column, names)}"
        if str(wanted) not in seen[column]:
            break
        earlier.append(f"{column}={str(wanted)!r}")
    rows = f"no row with {' and '.join(earlier)}" if earlier else "no row"
    return f"{rows} has {column}={str(wanted)!r}, only {_some(str(wanted), seen[column])}"


def _some(word: str, known: Iterable[str]) -> str:
    names = sorted(known)
    listed = ", ".join(repr(name) for name in names[:_NAMED])
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{listed or 'nothing'}{more}{did_you_mean(word, names)}"


def fill_splits(rows: Sequence[Row], validation_ratio: float, test_ratio: float, seed: int, held_in: bool) -> list[Row]:
    """Give every row without a split one, and keep the order of the rows.

    All such rows of a held-out task are test rows. Of a held-in task, `validation_ratio` of them go to validation and
    `test_ratio` to the test, rounded, and at least one row for a ratio above zero if there are three rows.
    """
    unsplit = [index for index, row in enumerate(rows) if row.split is None]
    found = list(rows)
    if not held_in:
        for index in unsplit:
            found[index] = replace(rows[index], split="test")
        return found
    shuffled = sorted(unsplit, key=lambda index: (_digest(rows[index].input, seed), index))
    test = _share(len(unsplit), test_ratio)
    validation = _share(len(unsplit), validation_ratio)
    for place, index in enumerate(shuffled):
        split = "test" if place < test else "validation" if place < test + validation else "train"
        found[index] = replace(rows[index], split=split)
    return found


def _share(rows: int, ratio: float) -> int:
    least = 1 if ratio > 0 and rows >= 3 else 0
    return max(least, int(rows * ratio + 0.5))


def _digest(text: str, seed: int) -> bytes:
    return blake2b(f"{seed}\0{text}".encode(), digest_size=16).digest()
