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
from modular_experts.data.rows import OWN, SPLITS, Row, RowReader, recognise, template_fields
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
        given = {key: getattr(self, key) for key in ("path", "hub", "subset", "source")}
        texts = {key: one if isinstance(one, str) else type(one).__name__ for key, one in given.items() if one}
        return ", ".join(f"{key}: {text}" for key, text in texts.items())

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
            if self.path is not None:
                place, records = self.path, path_records(self.path, self.where)
            elif self.hub is not None:
                place, records = self.hub, hub_records(self.hub, self.subset, self.revision, self.where)
            else:
                assert self.source is not None
                place, rows = type(self.source).__name__, self.source.rows()
                records = (Record(f"{place}:{number}", values) for number, values in enumerate(rows, 1))
            if self.where:
                records = _matching(place, records, self.where)
            form, columns = OWN, self.columns
            if self.template is None and not {"input", "target", "messages"} & set(columns):
                # The first hundred records tell the columns.
                records = iter(records)
                first = list(islice(records, 100))
                names = [str(name) for one in first if isinstance(one.values, Mapping) for name in one.values]
                form, records = recognise([*dict.fromkeys(names)]) if names else OWN, chain(first, records)
                columns = {**form.columns, **columns}
                if form != OWN:
                    report(f"{self.name}: {form}")
            if "messages" in columns and self.choices:
                raise ValueError("choices are for rows of input and target, and these rows are conversations")
            found, bad = RowReader(columns, self.template, self.choices, form.optional, targets).read(records)
            return found, bad if found or bad else [f"{place}:1: the file is empty: it has no rows"]
        except ValueError as error:
            raise ValueError(f"task {self.name!r}: {error}") from error


if TYPE_CHECKING:
    OneTask = Task | Mapping[str, Any] | str | os.PathLike[str]
    Tasks = OneTask | Iterable[OneTask]
else:
    # What the command line may be given.
    Tasks = str | Task | list[Task | str]


def as_tasks(tasks: Tasks) -> list[Task]:
    """Return the tasks; a path, or a mapping of a task's settings, becomes a `Task`."""
    made: dict[str, Task] = {}
    known = [entry.name for entry in fields(Task)]
    for given in [tasks] if isinstance(tasks, Task | Mapping | str | os.PathLike) else tasks:
        if isinstance(given, Mapping):
            for key in (key for key in given if key not in known):
                raise ValueError(f"a task has no {key!r}; it has {', '.join(known)}{did_you_mean(key, known)}")
            given = Task(**given)
        task = given if isinstance(given, Task) else Task(path=os.fspath(given))
        if task.name in made:
            raise ValueError(
                f"two tasks have the name {task.name!r} ({made[task.name]._origin} and {task._origin}); results are "
                f"kept by name, so name one of them: {{name: {task.name}-2, {task._origin}}}"
            )
        made[task.name] = task
    if not made:
        raise ValueError("no tasks were given; a task is at least the path of its file, such as intents.jsonl")
    return list(made.values())


def _matching(place: str, records: Iterable[Record], where: Wanted) -> Iterator[Record]:
    """Yield the records with the wanted values in their columns, and the records that could not be read."""
    seen: dict[str, set[str]] = {column: set() for column in where}
    found = False
    for record in records:
        readable = record.problem is None and isinstance(record.values, Mapping)
        for column, wanted in where.items() if readable else ():
            value = record.values.get(column)
            if value is not None:
                seen[column].add(str(value))
            if value is None or str(value) != str(wanted):
                break
        else:
            found = True
            yield record
    if not found:
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
    found = list(rows)
    for place, index in enumerate(shuffled):
        split = "test" if place < test else "validation" if place < test + validation else "train"
        found[index] = replace(rows[index], split=split)
    return found


def repeats(rows: Sequence[Row]) -> list[str]:
    """Count the rows of each split that repeat an earlier one of it, and those that are also training rows."""
    by_split = {split: [(row.input, row.target) for row in rows if row.split == split] for split in SPLITS}
    inside = {split: len(mine) - len({*mine}) for split, mine in by_split.items()}
    found = [f"{n} of {len(by_split[split])} {split} rows repeat an earlier one" for split, n in inside.items() if n]
    trained = {*by_split.pop("train")}
    again = {split: sum(row in trained for row in mine) for split, mine in by_split.items()}
    counts = [f"{n} of {len(by_split[split])} {split} rows" for split, n in again.items() if n]
    return found + [f"{' and '.join(counts)} {TRAINED}"] * bool(counts)


def warn_of_repeats(task: str, rows: Sequence[Row]) -> None:
    """Warn, once in a process, of validation and test rows that are also training rows."""
    for sentence in (one for one in repeats(rows) if one.endswith(TRAINED)):
        warn_once(
            f"{task}: {sentence}, which an expert may know by heart; remove the copies, or give all copies of a row "
            "one `split`"
        )
