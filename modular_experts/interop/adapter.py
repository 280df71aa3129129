"""Hold what another tool trained, and store differences of weights without loss."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from modular_experts.deltas import Delta, Dense, Sparse
from modular_experts.deltas.tiles import index_dtype


@dataclass(frozen=True)
class ImportedAdapter:
    """The deltas of another tool's fine-tuning by the names of weights in the loaded base, and facts of its files.

    An iteration over the deltas can be repeated.
    """

    deltas: Iterable[tuple[str, Delta]]
    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)


def lossless(difference: Tensor) -> Delta:
    """Return the difference of a weight as `Sparse` where that takes fewer bytes, else as `Dense`."""
    moved, index = int(difference.count_nonzero()), index_dtype(difference.shape)
    if moved * (4 + index.itemsize) >= 4 * difference.numel():
        return Dense(difference)
    flat = difference.reshape(-1)  # PEFT states some deltas transposed
    indices = flat.nonzero()[:, 0]
    return Sparse(indices.to(index), flat[indices], difference.shape)
