"""Read the files of an expert by `docs/concepts/library.md`: every delta becomes dense float64 values and a mask."""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

PLACES = ("indices", "blocks", "gaps", "mask", "rice")


@dataclass
class Delta:
    """What an expert moves in one weight: float64 `values`, and which entries it keeps, also where they are zero."""

    values: Tensor
    kept: Tensor
    form: str = "Dense"


def dense(values: Tensor) -> Delta:
    return Delta(values.double(), torch.ones_like(values, dtype=torch.bool))


def absent(shape: torch.Size) -> Delta:
    """Return the delta of an expert that does not move a weight."""
    return Delta(torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.bool), "Sparse")


def read_expert(path: Path) -> dict[str, Delta]:
    """Return an expert's deltas by weight; every tensor must have the SHA-256 of the table, and that the record's."""
    with safe_open(path / "delta.safetensors", "pt") as file:
        table = json.loads(file.metadata()["modular_experts"])["weights"]
        text = json.dumps(table, sort_keys=True, separators=(",", ":"))
        record = json.loads((path / "expert.json").read_text(encoding="utf-8"))
        assert hashlib.sha256(text.encode()).hexdigest() == record["content_hash"], "the content hash differs"
        return {name: _delta(name, entry, file) for name, entry in table.items()}


def _delta(name: str, entry: dict[str, Any], file: Any) -> Delta:
    stored = {part: file.get_tensor(f"{name}/{part}") for part in entry["tensors"]}
    for part, facts in entry["tensors"].items():
        content = stored[part].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert hashlib.sha256(content).hexdigest() == facts["sha256"], f"{name}/{part}"
    shape = torch.Size(entry["shape"])
    if entry["form"] == "Dense":
        return dense(_values(stored, entry, "dense", lambda size: _rows(size)))
    if entry["form"] == "LowRank":
        up = _values(stored, entry, "up", lambda size: _rows(size[::-1]).T)
        down = _values(stored, entry, "down", _rows)
        return Delta(up.double() @ down.double(), torch.ones(shape, dtype=torch.bool), "LowRank")
    sizes = entry.get("sizes", {}).get("values") or list(stored["values"].shape)
    if entry["form"] == "Sparse":
        places = _places(stored, sizes[0], shape.numel())
        width = shape[1] if len(shape) == 2 else shape.numel()
        values = _values(stored, entry, "values", lambda _: places // width)
        flat, kept = torch.zeros(shape.numel()), torch.zeros(shape.numel(), dtype=torch.bool)
        flat[places], kept[places] = values, True
        return Delta(flat.view(shape).double(), kept.view(shape), "Sparse")
    count, height, width = sizes
    down, across = -(-shape[0] // height), -(-shape[1] // width)
    places = _places(stored, count, down * across)
    rows = (places // across * height)[:, None, None] + torch.arange(height)[:, None]
    columns = (places % across * width)[:, None, None] + torch.arange(width)
    # Entries beyond the right or the lower edge share one more row of scales, the last.
    beyond = (rows >= shape[0]) | (columns >= shape[1])
    values = _values(stored, entry, "values", lambda _: torch.where(beyond, shape[0], rows.expand_as(beyond)))
    padded = torch.zeros(down * height, across * width)
    kept = torch.zeros_like(padded, dtype=torch.bool)
    padded[rows, columns], kept[rows, columns] = values, True
    return Delta(padded[: shape[0], : shape[1]].double(), kept[: shape[0], : shape[1]], "BlockSparse")


def _rows(size: list[int]) -> Tensor:
    """Return for each entry of a tensor the number of its row of scales; one dimension is one row."""
    return torch.arange(size[0])[:, None].expand(size) if len(size) == 2 else torch.zeros(size, dtype=torch.long)


def _values(stored: dict[str, Tensor], entry: dict[str, Any], part: str, rows_of: Any) -> Tensor:
    """Return the float32 values of a tensor that may be encoded; `rows_of` gives each entry's row of scales."""
    if f"{part}.codes" not in stored:
        return stored[part].float()
    size, planes = entry["sizes"][part], stored[f"{part}.codes"]
    codes = _numbers(planes, math.prod(size)).view(size)
    scales, rows = stored[f"{part}.scales"].float(), rows_of(size)
    if entry["encoding"] in ("int8", "int4"):
        top = 2 ** (len(planes) - 1) - 1
        return (codes - top) * scales[rows, 0]
    magnitudes = scales[rows, codes // 2]
    return torch.where(codes % 2 == 1, magnitudes, -magnitudes)


def _bits(packed: Tensor) -> Tensor:
    return ((packed[:, None].int() >> torch.arange(8)) & 1).reshape(-1)


def _numbers(planes: Tensor, count: int) -> Tensor:
    """Return numbers whose bits stand in planes, the lowest first."""
    numbers = torch.zeros(count, dtype=torch.long)
    for bit, plane in enumerate(planes):
        numbers |= _bits(plane)[:count].long() << bit
    return numbers


def _places(stored: dict[str, Tensor], count: int, limit: int) -> Tensor:
    """Return the numbers of kept entries or tiles; there are `count` of them, all below `limit`."""
    encoding = next(name for name in PLACES if name in stored)
    raw = stored[encoding]
    if encoding in ("indices", "blocks"):
        return raw.long()
    if encoding == "mask":
        return _bits(raw)[:limit].nonzero()[:, 0]
    if encoding == "gaps":
        ends = raw != 0
        return (torch.where(ends, raw.long(), 255).cumsum(0) - 1)[ends]
    low, width = int(raw[0]), -(-count // 8)
    remainders = _numbers(raw[1 : 1 + low * width].view(low, width), count)
    ones = _bits(raw[1 + low * width :]).nonzero()[:count, 0]
    quotients = torch.diff(ones, prepend=torch.tensor([-1])) - 1
    return ((quotients << low) + remainders + 1).cumsum(0) - 1
