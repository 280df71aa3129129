"""Draw rows of tasks and write them as JSON lines."""

import json
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soak.case import Case

Row = dict[str, Any]


@dataclass(frozen=True)
class TaskFile:
    """A file of rows, and the rows."""

    path: Path
    rows: list[Row]

    @property
    def name(self) -> str:
        return self.path.stem

    def split(self, name: str) -> list[Row]:
        """Return the rows of one split, in the order of the file."""
        return [row for row in self.rows if row["split"] == name]


def random_task(
    case: Case, name: str, folder: Path | None = None, choices: bool | None = None, long: bool = False
) -> TaskFile:
    """Write a task of all three splits as `name.jsonl`; rows with `choices` have three or four of them."""
    if choices is None:
        choices = case.chance(0.3)
    counts = {"train": case.random.randint(9, 20), "validation": case.random.randint(2, 5)}
    counts["test"] = case.random.randint(3, 6)
    rows = [random_row(case, split, choices, long) for split, count in counts.items() for _ in range(count)]
    if case.chance(0.3):
        case.random.shuffle(rows)
    return write_task(folder or case.folder, name, rows, ascii_only=case.chance(0.5))


def write_task(folder: Path, name: str, rows: list[Row], ascii_only: bool = True) -> TaskFile:
    """Write rows as `name.jsonl`."""
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows), encoding="utf-8")
    return TaskFile(path, rows)


def random_row(case: Case, split: str, choices: bool = False, long: bool = False) -> Row:
    """Draw an input, which may end in space, and a target, which may have accents or spaces inside."""
    draw = case.random
    word = random_word(case, 30 if long else 9)
    target = draw.choice([word[::-1][:5], "yes", "no", word[:2].upper(), "né à", "a b"])
    start = draw.choice(["", "Q: ", "say\n"])
    end = draw.choice(["", "", " ", "\n"])
    row: Row = {"input": start + word + end, "target": target, "split": split}
    if choices:
        row["choices"] = list(dict.fromkeys(["yes", "no", "maybe so", target]))
        draw.shuffle(row["choices"])
    return row


def random_word(case: Case, most: int = 9) -> str:
    """Draw a word of two letters or more."""
    return "".join(case.random.choices(string.ascii_lowercase, k=case.random.randint(2, most)))
