"""Where: which records of a table belong to a task, by what stands in their columns.

One table often holds many tasks, and a column names the task of each row: `where: {task_name: sciq_Multiple_Choice}`.
Values are compared as texts, because a CSV file knows nothing else. What makes a record a good row is not judged here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches

from modular_experts.data.sources import Record, Wanted

__all__ = ["matching"]

_NAMED = 5


def matching(place: str, records: Iterable[Record], where: Wanted) -> Iterator[Record]:
    """Yield the records whose columns hold the given values, and those that could not be read.

    Args:
        place: Where the records come from, for the sentence.
        records: All records of the table.
        where: The wanted value of each named column.

    Raises:
        ValueError: There is no such record; the sentence says what the columns hold instead.
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
    """Compare column by column up to the first that differs; `seen` keeps what each comparison met."""
    for column, wanted in where.items():
        if values.get(column) is None:
            return False
        seen[column].add(str(values[column]))
        if str(values[column]) != str(wanted):
            return False
    return True


def _nothing(where: Wanted, seen: Mapping[str, set[str]], names: set[str]) -> str:
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
    near = get_close_matches(word, names, n=1)
    listed = ", ".join(repr(name) for name in names[:_NAMED])
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{listed or 'nothing'}{more}" + (f"; did you mean {near[0]!r}?" if near else "")
