"""Every format gives the same records, and what cannot be read is named by file and line."""

import csv
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from modular_experts.data.sources import path_records

ROWS = [
    {"input": "say a", "target": "A"},
    {"input": 'two\nlines, "quoted"', "target": "ü 漢"},
    {"input": "c", "target": "C"},
]


def write(folder: Path, suffix: str, rows: Sequence[Mapping[str, Any]] = ROWS) -> str:
    """Write rows in the format that a suffix names, and return where."""
    path = folder / f"rows{suffix}"
    if suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    elif suffix == ".json":
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    elif suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(path)
    return str(path)


#: The line each row starts on: blank lines between JSON lines, a CSV field of two lines; numbers in a JSON list.
LINES = {
    ".jsonl": [1, 3, 5],
    ".json": [0, 1, 2],
    ".csv": [2, 3, 5],
    ".tsv": [2, 3, 5],
    ".parquet": [1, 2, 3],
    "": [1, 2, 3],
}


@pytest.mark.parametrize("suffix", LINES)
def test_every_format_gives_the_same_rows_with_their_lines(tmp_path: Path, suffix: str, capfd) -> None:
    path = write(tmp_path, suffix)
    records = list(path_records(path))
    assert [record.values for record in records] == ROWS
    place = "{}[{}]" if suffix == ".json" else "{}:{}"
    assert [record.where for record in records] == [place.format(path, line) for line in LINES[suffix]]


def test_a_dataset_dictionary_gives_its_splits_and_label_names(tmp_path: Path, capfd) -> None:
    label = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"input": datasets.Value("string"), "target": label})
    part = datasets.Dataset.from_dict({"input": ["a", "b"], "target": [1, 0]}, features=features)
    datasets.DatasetDict({"train": part, "test": part.select([1])}).save_to_disk(tmp_path / "d")
    records = list(path_records(str(tmp_path / "d")))
    wanted = [("train", "a", "yes"), ("train", "b", "no"), ("test", "b", "no")]
    assert [tuple(record.values.values()) for record in records] == wanted
    assert records[2].where == f"{tmp_path / 'd'}[test]:1"


BROKEN = {
    ("cut.jsonl", b'{"input": "a", "target": "b"}\n{"input": "a", "targ\n'): (2, "broken JSON at column 16: Unterm"),
    ("latin.jsonl", '{"input": "é"}\n'.encode("latin-1")): (1, "not UTF-8"),
    ("latin_lines.jsonl", '{"input": "a"}\n{"input": "é"}\n{"input": "è"}\n'.encode("latin-1")): (2, "not UTF-8"),
    ("utf16.jsonl", '{"input": "a"}\n{"input": "b"}\n{"input": "c"}\n'.encode("utf-16")): (1, "not UTF-8"),
    ("list.json", b'[\n {"input": "a"},\n {"input" "b"}\n]'): (3, "broken JSON"),
    ("short.csv", b"input,target\na,b\nc\n"): (3, "1 fields, but the header has 2"),
    ("twice.csv", b"input,target,target\na,b,c\n"): (1, "two columns are called 'target'; rename one"),
    ("latin.csv", "input,target\nä,b\n".encode("latin-1")): (1, "save it as UTF-8 (in Excel: CSV UTF-8)"),
    ("text.parquet", b"hello"): (1, "not a readable Parquet file"),
}


def test_what_cannot_be_read_is_named_by_file_and_line(tmp_path: Path) -> None:
    for (name, content), (line, sentence) in BROKEN.items():
        path = tmp_path / name
        path.write_bytes(content)
        (bad,) = [record for record in path_records(str(path)) if record.problem]
        assert bad.where == f"{path}:{line}"
        assert bad.problem is not None
        assert sentence in bad.problem, name
        assert "\n" not in bad.problem, name


def test_a_json_file_of_lines_is_read_as_lines_and_reading_goes_on_after_a_broken_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('{"a": 1}\n{\n{"a": 2}\n[\n')
    records = list(path_records(str(path)))
    assert [record.values for record in records] == [{"a": 1}, None, {"a": 2}, None]
    assert [record.where for record in records] == [f"{path}:{line}" for line in (1, 2, 3, 4)]


def test_a_missing_file_gets_the_near_name_and_a_pipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "intents.jsonl").touch()
    for path, missing, place, near in (
        ("tasks/intnets.jsonl", "intnets.jsonl", tmp_path / "tasks", "intents.jsonl"),
        ("taks/deep/intents.jsonl", "taks", tmp_path, "tasks"),
    ):
        sentence = f"{path}: there is no '{missing}' in '{place}'; did you mean {near}?"
        with pytest.raises(ValueError, match=re.escape(sentence) + ".* benchmarks are for the command harness"):
            path_records(str(tmp_path / path))
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(ValueError, match=r"pipe\.jsonl is neither a file nor a directory; write the rows to a file"):
        path_records(str(tmp_path / "pipe.jsonl"))


@pytest.mark.parametrize("mark", [";", "\t"])
def test_a_spreadsheet_may_write_semicolons_or_tabs(mark: str, tmp_path: Path) -> None:
    path, long = tmp_path / "rows.csv", "c" * 140_000  # more than Python's csv reads unless it is told to
    path.write_text(f'\ninput;target\n"a{mark} b";1,5\n{long};2\n'.replace(";", mark), encoding="utf-8-sig")
    assert [one.values for one in path_records(str(path))] == [
        {"input": f"a{mark} b", "target": "1,5"},
        {"input": long, "target": "2"},
    ]


def test_an_unknown_suffix_and_a_directory_of_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match=r"ends in one of \.jsonl"):
        path_records(str(tmp_path / "a.txt"))
    with pytest.raises(ValueError, match=r"not written by datasets\.save_to_disk; name a file in it"):
        list(path_records(str(tmp_path)))
