"""Read the records of a task from a file, a `datasets` directory, the hub, or a class of the user's own.

A record is what one place holds, together with that place (`file:line`), so that people find a bad one. `rows.py`
decides what a good record is.
"""

from __future__ import annotations

import csv
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["Record", "TaskSource", "Wanted", "hub_records", "path_records", "source_records"]

Wanted = Mapping[str, str | int | float | bool]
"""The wanted value of some columns."""


@dataclass(frozen=True)
class Record:
    """One record as found: `values` at `where`, or the `problem` that kept it from being read."""

    where: str
    values: Any = None
    problem: str | None = None


class TaskSource(ABC):
    """Gives rows from code of your own: subclass it and name it in the task, `source: {class_path: my_file.Mine}`."""

    @abstractmethod
    def rows(self) -> Iterable[Mapping[str, Any]]:
        """Yield one mapping per row with at least `input` and `target`, in the same order each time."""


def source_records(source: TaskSource) -> Iterator[Record]:
    """Read a user's source; the place of a row is its number."""
    for number, values in enumerate(source.rows(), 1):
        yield Record(f"{type(source).__name__}:{number}", values)


def path_records(path: str, where: Wanted | None = None) -> Iterator[Record]:
    """Read a JSONL, JSON, CSV, TSV or Parquet file, or a directory written by `datasets.save_to_disk`.

    `where` is a hint: a directory may skip rows that it rules out. The caller filters all records by it.

    Raises:
        ValueError: The path does not exist, or its suffix is unknown.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        return _directory_records(path, place, where or {})
    if not place.is_file():
        raise ValueError(_missing(path, place))
    if place.suffix.lower() not in READERS:
        raise ValueError(f"{path}: a task file ends in one of {', '.join(READERS)}, not in {place.suffix!r}")
    return _never_empty(path, READERS[place.suffix.lower()](path, place))


def hub_records(
    name: str, subset: str | None = None, revision: str | None = None, where: Wanted | None = None
) -> Iterator[Record]:
    """Read all splits of a dataset of the Hugging Face hub; class labels become their names.

    `where` is a hint: rows that it rules out may be skipped. The caller filters all records by it.

    Raises:
        ValueError: The hub, or the dataset on it, could not be reached or read.
    """
    return _dataset_records(name, _hub_dataset(name, subset, revision), where or {})


# The tasks of one dataset open it one after the other; an open table lies on disk and costs no memory.
@cache
def _hub_dataset(name: str, subset: str | None, revision: str | None) -> Any:
    import datasets  # a second of imports that a run on files does not need

    try:
        return datasets.load_dataset(name, subset, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"hub dataset {name!r} could not be loaded ({_one_line(error)}); without a network, give `path`: a file, "
            "or a directory written by datasets.save_to_disk"
        ) from error


def _directory_records(path: str, place: Path, where: Wanted) -> Iterator[Record]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(place))
    except (OSError, ValueError) as error:
        inside = sorted(entry.name for entry in place.iterdir())[:5]
        raise ValueError(
            f"{path}: this directory was not written by datasets.save_to_disk; name a file in it (it holds "
            f"{', '.join(inside) or 'nothing'})"
        ) from error
    return _never_empty(path, _dataset_records(path, loaded, where))


def _dataset_records(name: str, loaded: Any, wanted: Wanted) -> Iterator[Record]:
    """Yield the rows of a Dataset, or of a DatasetDict, whose keys stand for a missing `split` column."""
    import datasets

    splits = loaded if isinstance(loaded, Mapping) else {None: loaded}
    for split, dataset in splits.items():
        labels = {key: kind for key, kind in dataset.features.items() if isinstance(kind, datasets.ClassLabel)}
        rows = _possible_rows(dataset, wanted)
        for number, values in zip(rows, dataset.select(rows), strict=True):
            named = {
                k: labels[k].int2str(v) if k in labels and isinstance(v, int) and v >= 0 else v
                for k, v in values.items()
            }
            where = f"{name}:{number + 1}" if split is None else f"{name}[{split}]:{number + 1}"
            yield Record(where, named if split is None else {"split": str(split)} | named)


def _possible_rows(dataset: Any, wanted: Wanted) -> Sequence[int]:
    """Return the numbers of rows that may be wanted, from the table's columns of text, without reading rows.

    The comparison ends at the first wanted column that does not hold text. If a column rules out every row, the result
    is one row of each of its values, so that the caller's error can list them.
    """
    from pyarrow import compute

    rows: Sequence[int] = range(len(dataset))
    for column, value in wanted.items():
        if column not in dataset.features and column != "split":  # which may be the key of the whole table
            return rows[:1]
        if getattr(dataset.features.get(column), "dtype", None) not in ("string", "large_string"):
            return rows
        texts = dataset.select(rows).with_format("arrow")[column][:]
        found = compute.indices_nonzero(compute.equal(texts, str(value)))
        if not len(found):
            return [rows[place] for place in compute.index_in(texts.unique(), value_set=texts).to_pylist()]
        rows = [rows[place] for place in found.to_pylist()]
    return rows


def _json_lines(path: str, place: Path) -> Iterator[Record]:
    with place.open("rb") as file:
        yield from _lines(path, file)


def _lines(path: str, lines: Iterable[bytes]) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip()
            if text:
                yield Record(where, json.loads(text))
        except UnicodeDecodeError:
            yield Record(where, problem="this line is not UTF-8 text")
        except json.JSONDecodeError as error:
            yield Record(where, problem=f"broken JSON, {_json_error(error)}: {_excerpt(text)}")


def _json_file(path: str, place: Path) -> Iterator[Record]:
    """Read a list of objects; a file that starts with an object is read line by line."""
    raw = place.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
        if not text.lstrip().startswith("["):
            return _lines(path, io.BytesIO(raw))
        json.loads(text)
    except UnicodeDecodeError:
        return iter([Record(f"{path}:1", problem="this file is not UTF-8 text")])
    except json.JSONDecodeError as error:
        return iter([Record(f"{path}:{error.lineno}", problem=f"broken JSON, {_json_error(error)}")])
    return _array_elements(path, text)


def _array_elements(path: str, text: str) -> Iterator[Record]:
    """Yield the elements of a well-formed JSON list, each with the line that it starts on."""
    decoder = json.JSONDecoder()
    line, seen, end = 1, 0, text.index("[")
    while text[start := _next_token(text, end + 1)] != "]":
        line, seen = line + text.count("\n", seen, start), start
        value, end = decoder.raw_decode(text, start)
        end = _next_token(text, end)
        yield Record(f"{path}:{line}", value)
        if text[end] == "]":
            return


def _next_token(text: str, position: int) -> int:
    while text[position].isspace():
        position += 1
    return position


def _delimited(path: str, place: Path) -> Iterator[Record]:
    delimiter = "\t" if place.suffix.lower() == ".tsv" else ","
    with place.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        # A quoted field may span lines; a row's place is the line that it starts on.
        line = 1
        try:
            for fields in reader:
                where, line = f"{path}:{line}", reader.line_num + 1
                if header is None:
                    header = fields
                elif fields and len(fields) != len(header):
                    yield Record(where, problem=f"{len(fields)} fields, but the header has {len(header)}")
                elif fields:
                    yield Record(where, dict(zip(header, fields, strict=True)))
        except (csv.Error, UnicodeDecodeError) as error:
            yield Record(f"{path}:{line}", problem=f"not readable as CSV from here on: {_one_line(error)}")


def _parquet(path: str, place: Path) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    try:
        batches = parquet.ParquetFile(place).iter_batches()
        number = 0
        for batch in batches:
            for values in batch.to_pylist():
                number += 1
                yield Record(f"{path}:{number}", values)
    except (pyarrow.ArrowException, OSError) as error:
        yield Record(f"{path}:1", problem=f"not a readable Parquet file: {_one_line(error)}")


READERS = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_file,
    ".csv": _delimited,
    ".tsv": _delimited,
    ".parquet": _parquet,
}


def _never_empty(path: str, records: Iterator[Record]) -> Iterator[Record]:
    empty = True
    for record in records:
        empty = False
        yield record
    if empty:
        yield Record(f"{path}:1", problem="the file is empty: it has no rows")


def _missing(path: str, place: Path) -> str:
    parent = place.parent
    if not parent.is_dir():
        sentence = (
            f"{path}: no such file; the directory {str(parent)!r} does not exist (looked from {str(Path.cwd())!r})"
        )
    else:
        names = sorted(entry.name for entry in parent.iterdir() if entry.is_dir() or entry.suffix.lower() in READERS)
        near = get_close_matches(place.name, names, n=3, cutoff=0.5) or names[:5]
        there = f"near it: {', '.join(near)}" if near else "there are no task files"
        sentence = f"{path}: no such file; in {str(parent.resolve())!r} {there}"
    return (
        sentence if place.suffix else f"{sentence}. A dataset of the Hugging Face hub is named by `hub`, not by `path`"
    )


def _json_error(error: json.JSONDecodeError) -> str:
    return f"{error.msg.removesuffix(' at')} at column {error.colno}"


def _excerpt(text: str) -> str:
    text = text.strip()
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
