"""Files that the library did not write: made by hand, as an older version, another program or an attacker would."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from modular_experts.deltas import Delta

__all__ = ["as_it_is", "number_the_file", "write_by_hand"]

Weight = tuple[str, Sequence[int], Mapping[str, Tensor]]


def as_it_is(delta: Delta) -> Weight:
    """Return form, shape and tensors of a sparse delta as they were stored before there was an encoding."""
    tensors = {name: tensor.float() if name == "values" else tensor.int() for name, tensor in delta.tensors().items()}
    return type(delta).__name__, list(delta.shape), tensors


def write_by_hand(path: Path, weights: Mapping[str, Weight], record: Mapping[str, Any]) -> Path:
    """Write an expert whose hashes are all right, whatever its tensors are."""
    path.mkdir(parents=True)
    tensors = {f"{name}/{part}": tensor for name, (_, _, parts) in weights.items() for part, tensor in parts.items()}
    table = {
        name: {"form": form, "shape": list(shape), "tensors": {part: _entry(tensor) for part, tensor in parts.items()}}
        for name, (form, shape, parts) in weights.items()
    }
    metadata = json.dumps({"format": record["format"], "weights": table})
    save_file(tensors, path / "delta.safetensors", {"modular_experts": metadata})
    content = json.dumps(table, sort_keys=True, separators=(",", ":")).encode()
    full = {**record, "content_hash": hashlib.sha256(content).hexdigest()}
    (path / "expert.json").write_text(json.dumps(full))
    return path


def _entry(tensor: Tensor) -> dict[str, Any]:
    content = tensor.contiguous().numpy().tobytes()
    return {"dtype": str(tensor.dtype), "shape": list(tensor.shape), "sha256": hashlib.sha256(content).hexdigest()}


def number_the_file(base: Path) -> None:
    """Name a checkpoint's one file as the only part of one, in an index."""
    file = base / "model.safetensors"
    names, number = load_file(file), "model-00001-of-00001.safetensors"
    size = sum(tensor.nbytes for tensor in names.values())
    file.rename(base / number)
    index = {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(sorted(names), number)}
    (base / f"{file.name}.index.json").write_text(json.dumps(index))
