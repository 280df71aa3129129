"""Weight files: the safetensors files of a Hugging Face checkpoint, found by its index and opened with care."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

__all__ = ["open_tensors", "read_json", "weight_files"]

_INDEX = "model.safetensors.index.json"


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files that make up a checkpoint, after a look at each header.

    Raises:
        FileNotFoundError: There are none, or one that the index names is missing.
        ValueError: A file is damaged.
    """
    files = [directory / "model.safetensors"]
    if (directory / _INDEX).is_file():
        names = set(read_json(directory / _INDEX, "so the weights cannot be found").get("weight_map", {}).values())
        files = [directory / Path(name).name for name in sorted(names)]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"{directory} has no {file.name}, and only safetensors weights are read; save the model with "
                "transformers' save_pretrained, or fetch the missing file"
            )
        with open_tensors(file):
            pass
    return files


@contextmanager
def open_tensors(file: Path) -> Iterator[Any]:
    """Open a safetensors file; the sentence of a damaged one names it."""
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: it is cut short or no safetensors file ({error})") from error


def read_json(file: Path, consequence: str) -> dict[str, Any]:
    """Read a JSON object; the sentence of a missing file says what follows from that."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing, {consequence}")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is damaged: it is not valid JSON ({error})") from error
