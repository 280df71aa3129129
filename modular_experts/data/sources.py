"""Read the records of a task, with the place of each, from a file, a `datasets` directory, the hub, or a class."""

import csv
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from modular_experts.text import did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

Wanted = Mapping[str, str | int | float | bool]
"""The wanted value of some columns."""


@dataclass(frozen=True)
class Record:
    """One record as found: `values` at `where`, or the `problem` that kept it from being read."""

    where: str
    values: object = None
    problem: str | None = None


class TaskSource(ABC):
    """Gives rows from code of your own: subclass it and name it in the task, `source: {class_path: my_file.Mine}`."""

    @abstractmethod
    def rows(self) -> Iterable[Mapping[str, object]]:
        """Yield one mapping per row with at least `input` and `target`, in the same order each time."""


def path_records(path: str, where: Wanted | None = None) -> Iterator[Record]:
    """Read a JSONL, JSON, CSV, TSV or Parquet file, or a directory written by `datasets.save_to_disk`.

    A directory may skip rows that `where` rules out; the caller filters all records by it.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        import datasets

        try:
            loaded = datasets.load_from_disk(str(place))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} was not written by datasets.save_to_disk; name a file in it") from error
        return _dataset_records(path, loaded, where or {})
    if place.exists() and not place.is_file():
        raise ValueError(f"{path} is neither a file nor a directory; write the rows to a file")
    if not place.exists():
        missing = next(part for part in (place.absolute(), *place.absolute().parents) if part.parent.exists())
        near = did_you_mean(missing.name, [entry.name for entry in missing.parent.glob("*")])
        raise ValueError(
            f"{path}: there is no {missing.name!r} in {str(missing.parent)!r}{near} "
            "(hub ids go into `hub`, classes that make rows into `source`; benchmarks are for the command harness)"
        )
    if place.suffix.lower() not in READERS:
        raise ValueError(f"{path}: a task file ends in one of {', '.join(READERS)}, not in {place.suffix!r}")
    return READERS[place.suffix.lower()](path, place)


def hub_records(
    name: str, subset: str | None = None, revision: str | None = None, where: Wanted | None = None
) -> Iterator[Record]:
    """Read all splits of a dataset of the Hugging Face hub; class labels become names, and `where` is as for a path."""
    return _dataset_records(name, _hub_dataset(name, subset, revision), where or {})


# The tasks of one dataset open it one after the other; an open table lies on disk and costs no memory.
@cache
def _hub_dataset(name: str, subset: str | None, revision: str | None) -> "Dataset | DatasetDict":
    import datasets  # a second of imports that a run on files does not need

    try:
        return datasets.load_dataset(name, subset, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"hub dataset {name!r} could not be loaded ({_one_line(error)}); without a network, give `path`"
        ) from error


def _dataset_records(name: str, loaded: "Dataset | DatasetDict", wanted: Wanted) -> Iterator[Record]:
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


def _possible_rows(dataset: "Dataset", wanted: Wanted) -> Sequence[int]:
    """Return the numbers of rows that may be wanted, from the table's columns of text, without reading rows.

    If a column rules out every row, the result is one row of each of its values, so that the caller's error can list
    them.
    """
    from pyarrow import compute

    rows: Sequence[int] = range(len(dataset))
    for column, value in wanted.items():
        if column not in dataset.features and column != "split":  # which may be the key of the whole table
            return rows[:1]
        if getattr(dataset.features.get(column), "dtype", None) not in ("string", "large_string"):
            return rows
        texts = dataset.select(rows).with_format("arrow")[column][:]
        fitting = compute.indices_nonzero(compute.equal(texts, str(value)))
        if not len(fitting):
            return [rows[place] for place in compute.index_in(texts.unique(), value_set=texts).to_pylist()]
        rows = [rows[place] for place in fitting.to_pylist()]
    return rows


def _json_lines(path: str, place: Path) -> Iterator[Record]:
    with place.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip()
                if text:
                    yield Record(f"{path}:{number}", json.loads(text))
            except ValueError as error:
                yield _broken_json(path, number, error)
                # The other lines have the same encoding.
                if isinstance(error, UnicodeDecodeError):
                    return


def _json_file(path: str, place: Path) -> Iterator[Record]:
    """Read a list of objects, whose places are their numbers from 0; a file that starts with an object holds lines."""
    try:
        text = place.read_text(encoding="utf-8-sig")
        if not text.lstrip().startswith("["):
            return _json_lines(path, place)
        return iter([Record(f"{path}[{number}]", values) for number, values in enumerate(json.loads(text))])
    except ValueError as error:
        return iter([_broken_json(path, getattr(error, "lineno", 1), error)])


NOT_UTF8 = "this is not UTF-8 text; save it as UTF-8 (in Excel: CSV UTF-8)"


def _broken_json(path: str, line: int, error: ValueError) -> Record:
    if isinstance(error, json.JSONDecodeError):
        return Record(f"{path}:{line}", problem=f"broken JSON at column {error.colno}: {error.msg.removesuffix(' at')}")
    return Record(f"{path}:{line}", problem=NOT_UTF8)


def _delimited(path: str, place: Path) -> Iterator[Record]:
    with place.open(encoding="utf-8-sig", newline="") as file:
        header: list[str] | None = None
        # A quoted field may span lines; a row's place is the line that it starts on.
        line = 1
        try:
            names = next(filter(str.strip, file), "")
            file.seek(0)
            # Spreadsheets write semicolons where numbers have a comma.
            delimiter = "\t" if place.suffix.lower() == ".tsv" else max(",;\t", key=names.count)
            csv.field_size_limit(2**31 - 1)  # Python's own limit is 131,072 characters of a cell
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            for fields in reader:
                where = f"{path}:{line}"
                line = reader.line_num + 1
                if not fields:
                    continue
                if header is None:
                    header = fields
                    if twice := [name for name in header if header.count(name) > 1]:
                        yield Record(where, problem=f"two columns are called {twice[0]!r}; rename one")
                elif len(fields) != len(header):
                    yield Record(where, problem=f"{len(fields)} fields, but the header has {len(header)}")
                else:
                    yield Record(where, dict(zip(header, fields, strict=True)))
        except UnicodeDecodeError:
            yield Record(f"{path}:{line}", problem=NOT_UTF8)
        except csv.Error as error:
            yield Record(f"{path}:{line}", problem=f"not readable as CSV from here on: {_one_line(error)}")


def _parquet(path: str, place: Path) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows = (values for batch in parquet.ParquetFile(place).iter_batches() for values in batch.to_pylist())
        yield from (Record(f"{path}:{number}", values) for number, values in enumerate(rows, 1))
    except (pyarrow.ArrowException, OSError) as error:
        yield Record(f"{path}:1", problem=f"not a readable Parquet file: {_one_line(error)}")


READERS = dict.fromkeys((".jsonl", ".ndjson"), _json_lines) | dict.fromkeys((".csv", ".tsv"), _delimited)
READERS |= {".json": _json_file, ".parquet": _parquet}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
