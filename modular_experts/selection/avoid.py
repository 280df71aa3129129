"""Keep a new expert away from the entries of other experts, or give it the support of one of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from modular_experts.deltas.tiles import tile_sums
from modular_experts.library import Library, StoredExpert, open_experts
from modular_experts.library.expert import RECORD_FILE
from modular_experts.selection.scoring import SelectableLayer

log = logging.getLogger(__name__)


def open_neighbours(paths: Sequence[str]) -> list[StoredExpert]:
    """Open experts; a directory that is a library stands for all the experts in it.

    Raises:
        ValueError: An expert is named twice or moves every entry, or a directory holds no experts.
    """
    found: list[str | Path] = []
    libraries: list[Path] = []
    for path in paths:
        directory = Path(path).expanduser()
        if not directory.is_dir() or (directory / RECORD_FILE).is_file():
            found.append(path)
            continue
        names = list(Library(directory))
        if not names:
            raise ValueError(f"{path} is neither an expert nor a library with experts to avoid")
        found += [directory / name for name in names]
        libraries.append(directory.resolve())
    sparse = []
    for expert in open_experts(found) if found else []:
        dense = sorted({form for form in expert.forms().values() if form not in ("Sparse", "BlockSparse")})
        if not dense:
            sparse.append(expert)
        elif expert.path.parent.resolve() in libraries:
            log.warning("%s moves every entry (%s) and is not avoided", expert.name, ", ".join(dense))
        else:
            raise ValueError(f"{expert.name} moves every entry ({', '.join(dense)}) and cannot be avoided")
    return sparse


def count_others(name: str, layer: SelectableLayer, others: Iterable[StoredExpert]) -> Tensor:
    """Return how many experts keep each unit of a layer's weight `(units,)`; a tile kept in part counts in part."""
    expert = layer.expert
    counts = torch.zeros(expert.units, device=layer.matrix.device)
    for delta in (layer.oriented(other[name]) for other in others if name in other):
        tile, units = delta.units or (None, delta.support()[:0])
        if tile is None:
            counts += 1.0
        elif tile == expert.tile:
            counts[units.to(counts.device).long()] += 1.0
        else:
            entries = torch.zeros(expert.shape.numel(), device=counts.device)
            entries[delta.support().to(counts.device).long()] = 1.0
            counts += tile_sums(entries.view(expert.shape), expert.tile) / math.prod(expert.tile)
    return counts


def shared_units(name: str, layer: SelectableLayer, other: StoredExpert) -> Tensor:
    """Return the units that another expert keeps of a layer's weight.

    Raises:
        ValueError: It keeps no entry of this weight, or units of another kind.
    """
    tile = layer.expert.tile
    found = layer.oriented(other[name]).units if name in other else None
    if found and found[0] == tile:
        return found[1].to(layer.matrix.device)
    kept = "every entry" if name in other else "nothing"
    if found:
        kept = "single entries" if found[0] == (1, 1) else f"tiles of {found[0][0]} x {found[0][1]}"
    raise ValueError(
        f"the support of {other.name} cannot be shared: it keeps {kept} at {name}, not units of {tile[0]} x {tile[1]}; "
        "use the granularity, block size and modules of that expert"
    )


def crowded(scores: Tensor, others: Tensor, penalty: float | None) -> Tensor:
    """Return the scores of units `(units,)`, lower where other experts keep them, as `count_others` found.

    A positive score is divided by `1 + penalty * others`, a negative one multiplied by it. Without a penalty, a unit
    that any other expert keeps gets the score minus infinity.
    """
    if penalty is None:
        return scores.masked_fill(others > 0, -math.inf)
    factor = 1 + penalty * others.to(scores.dtype)
    return torch.where(scores > 0, scores / factor, scores * factor)


def refuse_too_few(free: int, units: int, k: int) -> None:
    """Raise a ValueError if other experts leave fewer than k units."""
    if free < k:
        raise ValueError(
            f"the experts to avoid leave {free:,} of {units:,} units free, and {k:,} are to be kept; avoid fewer "
            "experts, keep less, or give a penalty, which excludes nothing"
        )
