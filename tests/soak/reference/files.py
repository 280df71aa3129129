"""Read the files of an expert by `docs/concepts/library.md`: every delta becomes dense float64 values and a mask."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor


class Delta(NamedTuple):
    """What an expert moves in one weight: float64 `values`, and which entries it keeps, also where they are zero."""

    values: Tensor
    kept: Tensor
    form: str


def read_expert(path: Path) -> dict[str, Delta]:
    """Return an expert's deltas by weight; every tensor must have the SHA-256 of the table, and that the record's."""
    deltas = {}
    with safe_open(path / "delta.safetensors", "pt") as file:
        table = json.loads(file.metadata()["modular_experts"])["weights"]
        text = json.dumps(table, sort_keys=True, separators=(",", ":"))
        record = json.loads((path / "expert.json").read_text(encoding="utf-8"))
        assert hashlib.sha256(text.encode()).hexdigest() == record["content_hash"], "the content hash differs"
        for name, entry in table.items():
            stored = {part: file.get_tensor(f"{name}/{part}") for part in entry["tensors"]}
            for part, tensor in stored.items():
                content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                assert hashlib.sha256(content).hexdigest() == entry["tensors"][part]["sha256"], f"{name}/{part}"
            deltas[name] = _delta(entry, stored)
    return deltas


def _delta(entry: dict[str, Any], stored: dict[str, Tensor]) -> Delta:
    shape, form = entry["shape"], entry["form"]
    if form == "Dense":
        return Delta(_values(entry, stored, "dense"), torch.ones(shape).bool(), form)
    if form == "LowRank":
        return Delta(_values(entry, stored, "up") @ _values(entry, stored, "down"), torch.ones(shape).bool(), form)
    # A sparse delta is one of tiles of one entry, and a vector is a matrix of one row.
    size = entry["sizes"]["values"] if "sizes" in entry else list(stored["values"].shape)
    count, height, width = [*size, 1, 1][:3]
    last, end = [1, *shape][-2:]
    across = -(-end // width)
    padded = torch.zeros(2, -(-last // height) * height, across * width, dtype=torch.float64)
    places = _places(stored, count, padded[0].numel() // (height * width))[:, None, None]
    rows = places // across * height + torch.arange(height)[:, None]
    columns = places % across * width + torch.arange(width)
    # Entries beyond the right or the lower edge share one more row of scales, the last.
    scales = torch.where((rows < last) & (columns < end), rows, last)
    padded[0, rows, columns] = _values(entry, stored, "values", scales).view(scales.shape)
    padded[1, rows, columns] = 1
    values, kept = padded[:, :last, :end].reshape(2, *shape)
    return Delta(values, kept.bool(), form)


def _values(entry: dict[str, Any], stored: dict[str, Tensor], part: str, rows: Tensor | None = None) -> Tensor:
    """Return the values of a tensor that may be encoded; each entry has the scales of a row."""
    if part in stored:
        return stored[part].double()
    if rows is None:
        size = entry["sizes"][part]
        numbers = torch.arange(torch.Size(size).numel()).view(size)
        # Each column of an upper factor is like a row.
        rows = numbers % size[-1] if part == "up" else numbers // size[-1]
    planes, scales = stored[f"{part}.codes"], stored[f"{part}.scales"].double()
    codes = _numbers(planes, rows.numel()).view(rows.shape)
    if entry["encoding"] in ("int8", "int4"):
        return (codes - 2 ** (len(planes) - 1) + 1) * scales[rows, 0]
    return scales[rows, codes // 2] * (2 * (codes % 2) - 1)


def _numbers(planes: Tensor, count: int) -> Tensor:
    """Return numbers whose bits stand in planes, the lowest first."""
    bits = (planes[:, :, None].long() >> torch.arange(8)) & 1
    return (bits.flatten(1) << torch.arange(len(planes))[:, None]).sum(0)[:count]


def _places(stored: dict[str, Tensor], count: int, limit: int) -> Tensor:
    """Return the numbers of kept entries or tiles; there are `count` of them, all below `limit`."""
    plain = stored.get("indices", stored.get("blocks"))
    if plain is not None:
        return plain.long()
    if "mask" in stored:
        return _numbers(stored["mask"][None], limit).nonzero()[:, 0]
    if "gaps" in stored:
        ends = stored["gaps"] != 0
        return (torch.where(ends, stored["gaps"].long(), 255).cumsum(0) - 1)[ends]
    # Rice codes have the lower bits of each gap in planes, and the others in unary behind them.
    low, rest = int(stored["rice"][0]), stored["rice"][1:]
    width = -(-count // 8)
    remainders = _numbers(rest[: low * width].view(low, width), count)
    ends = _numbers(rest[None, low * width :], 8 * len(rest)).nonzero()[:count, 0]
    return (((ends.diff(prepend=torch.tensor([-1])) - 1) << low) + remainders + 1).cumsum(0) - 1
