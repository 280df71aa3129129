"""Turn records into rows: an input text and a target text, perhaps with a split and choices.

Every record that is not a good row becomes one sentence, `file:line: what is wrong`. `sources.py` reads the records.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from string import Formatter
from typing import Any

from modular_experts.data.sources import Record
from modular_experts.text import did_you_mean

SPLITS = ("train", "validation", "test")
_SPLIT_ALIASES = {"training": "train", "val": "validation", "valid": "validation", "dev": "validation"}


@dataclass(frozen=True)
class Row:
    """One example; `split` is None if the data does not name one, `where` is its place (`file:line`)."""

    input: str
    target: str
    split: str | None = None
    choices: tuple[str, ...] = ()
    where: str = ""


def content_hash(rows: Iterable[Row]) -> str:
    """Return a hash of what rows hold, in their order: neither their places nor their splits count."""
    digest = blake2b(digest_size=16)
    for row in rows:
        held = {name: value for name, value in vars(row).items() if value and name not in ("split", "where")}
        digest.update(json.dumps(held, ensure_ascii=False, sort_keys=True).encode(errors="surrogatepass") + b"\n")
    return digest.hexdigest()


@dataclass(frozen=True)
class RowReader:
    """Turns records into rows.

    Args:
        columns: The data's column for `input`, `target`, `split` or `choices`, if it has another name.
        template: The input text, with columns in braces: "Question: {question}\\nAnswer:".
        choices: Possible targets of every row without choices of its own.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    template: str | None = None
    choices: Sequence[str] = ()

    def read(self, records: Iterable[Record]) -> tuple[list[Row], list[str]]:
        """Return the good rows, and one sentence for each bad one."""
        rows, problems = [], []
        for record in records:
            try:
                if record.problem is not None:
                    raise _BadRow(record.problem)
                if not isinstance(record.values, Mapping):
                    raise _BadRow(f"a row is an object with 'input' and 'target', not {reprlib.repr(record.values)}")
                text, target = self._input(record.values), self._text(record.values, "target")
                split, choices = self._split(record.values), self._choices(record.values, target)
                rows.append(Row(text, target, split, choices, record.where))
            except _BadRow as problem:
                problems.append(f"{record.where}: {problem}")
        return rows, problems

    def _text(self, values: Mapping[str, Any], key: str) -> str:
        column = self.columns.get(key, key)
        if column not in values:
            raise _BadRow(_no_column(column, values))
        return _checked(column, values[column])

    def _input(self, values: Mapping[str, Any]) -> str:
        if self.template is None:
            return self._text(values, "input")
        known = dict(values) | {key: values[column] for key, column in self.columns.items() if column in values}
        for name in template_fields(self.template):
            if name not in known:
                raise _BadRow(f"the template has {{{name}}}, but {_no_column(name, known)}")
            if known[name] is None:
                raise _BadRow(f"the template has {{{name}}}, which is null here")
        return _checked("input", self.template.format_map(known))

    def _split(self, values: Mapping[str, Any]) -> str | None:
        split = values.get(self.columns.get("split", "split"))
        if split is None or split == "":
            return None
        if isinstance(split, str) and (name := _SPLIT_ALIASES.get(split.lower(), split.lower())) in SPLITS:
            return name
        raise _BadRow(f"'split' is {reprlib.repr(split)}, not one of {', '.join(SPLITS)}{did_you_mean(split, SPLITS)}")

    def _choices(self, values: Mapping[str, Any], target: str) -> tuple[str, ...]:
        column = self.columns.get("choices", "choices")
        choices = values.get(column)
        if choices is None or choices == "":
            choices = list(self.choices)
        if isinstance(choices, str):
            # A CSV cell holds text only, which may be a JSON list.
            with suppress(json.JSONDecodeError):
                choices = json.loads(choices)
        if not isinstance(choices, list | tuple):
            raise _BadRow(f"{column!r} must be a list of texts, not {reprlib.repr(choices)}")
        texts = [_checked(column, choice) for choice in choices]
        if texts and (len(set(texts)) < len(texts) or len(texts) < 2):
            raise _BadRow(f"{column!r} needs two or more different texts, not {reprlib.repr(texts)}")
        if texts and target not in texts:
            raise _BadRow(f"target {reprlib.repr(target)} is not among its choices {reprlib.repr(texts)}")
        return tuple(texts)


def template_fields(template: str) -> list[str]:
    """Return the columns that a prompt template names, or raise a ValueError if it is malformed."""
    try:
        names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"template {template!r} is malformed ({error}); a literal brace is written twice") from error
    for name in names:
        if not name.replace("-", "_").replace(" ", "_").isidentifier():
            raise ValueError(f"template {template!r} has the field {{{name}}}, which is not a plain name of a column")
    return names


def raise_for_bad_rows(problems: Sequence[str]) -> None:
    """Raise a ValueError that counts all bad rows and quotes the first five, if there are any."""
    if problems:
        count = "1 bad row" if len(problems) == 1 else f"{len(problems)} bad rows"
        more = ", the first 5" if len(problems) > 5 else ""
        raise ValueError("\n".join([f"{count} in the task data, so nothing was run{more}:", *problems[:5]]))


def spread_evenly(rows: Sequence[Any], count: int) -> list[Any]:
    """Return at most `count` of the rows, at even distances over all of them."""
    return [rows[place * len(rows) // count] for place in range(count)] if count < len(rows) else list(rows)


class _BadRow(ValueError):
    """A sentence on one record, for the report of all bad rows."""


def _checked(column: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _BadRow(f"{column!r} must be text, not {reprlib.repr(value)}")
    if not value.strip():
        raise _BadRow(f"{column!r} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _BadRow(f"{column!r} holds a lone surrogate, half of a character: {ascii(value)[:60]}") from None
    return value


def _no_column(column: str, values: Mapping[str, Any]) -> str:
    names = [str(name) for name in values]
    return f"the row has no {column!r}, only {', '.join(map(repr, names)) or 'nothing'}{did_you_mean(column, names)}"
