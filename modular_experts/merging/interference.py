"""Measure how experts get in each other's way, before they are merged: overlap, conflicts of sign, cosines."""

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from modular_experts.deltas import Delta
from modular_experts.deltas.algebra import inner
from modular_experts.deltas.task_vector import TaskVector
from modular_experts.library.record import Record
from modular_experts.merging.merged import Merged
from modular_experts.methods import MergeMethod, SparseAverage
from modular_experts.methods.chunks import chunks_of, chunks_of_size
from modular_experts.progress import Progress
from modular_experts.text import block_of

HELD = 2**22
"""Entries of all experts that are held at once as plain numbers, 8 bytes each."""


@dataclass(frozen=True, eq=False)
class Sums:
    """What some weights add up to, for all pairs of N experts and for the merge m of their deltas `d_i`, in float64.

    Attributes:
        products: `(N, N)`, the inner products `<d_i, d_j>`; the diagonal holds each expert's energy.
        both: `(N, N)`, how many entries both experts move; the diagonal counts what each moves.
        against: `(N, N)`, how many of these they move in opposite directions.
        merged: `(N,)`, the inner products `<m, d_i>`.
        energy: `<m, m>`.
    """

    products: Tensor
    both: Tensor
    against: Tensor
    merged: Tensor
    energy: Tensor

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(*(mine + its for mine, its in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def cosine(self) -> Tensor:
        """Cosine of each pair `(N, N)`, 0 for an expert that moves nothing."""
        length = self.products.diagonal().sqrt()
        return self.products / (length[:, None] * length).clamp(min=1e-300)

    @property
    def overlap(self) -> Tensor:
        """Share of the entries that either expert of a pair moves which both move `(N, N)`: the Jaccard index."""
        kept = self.both.diagonal()
        return self.both / (kept[:, None] + kept - self.both).clamp(min=1)

    @property
    def conflict(self) -> Tensor:
        """Share of the entries that both experts of a pair move which they move in opposite directions `(N, N)`."""
        return self.against / self.both.clamp(min=1)

    @property
    def distance(self) -> Tensor:
        """How far the merge is from each expert, `|m - d_i|^2 / |d_i|^2` `(N,)`: 0 is the expert, 1 is like the base.

        An expert that moves nothing gets NaN.
        """
        own = self.products.diagonal()
        return (self.energy - 2 * self.merged + own) / own.where(own > 0, torch.nan)

    def as_dict(self) -> Record:
        """Return the measures in plain lists and numbers."""
        measures = {name: getattr(self, name).tolist() for name in ("cosine", "overlap", "conflict", "distance")}
        return measures | {"energy": self.products.diagonal().tolist(), "merged_energy": self.energy.item()}


@dataclass(frozen=True, eq=False)
class Interference:
    """How experts get in each other's way.

    Attributes:
        experts: Their names, in the order of all tensors.
        total: Sums over all weights.
        layers: Sums over the weights of each transformer block, by the block's name; of the other weights under "".
    """

    experts: list[str]
    total: Sums
    layers: dict[str, Sums]

    def as_dict(self) -> Record:
        """Return all measures in plain lists and numbers, as JSON holds them."""
        layers = {name: sums.as_dict() for name, sums in self.layers.items()}
        return {"experts": self.experts, **self.total.as_dict(), "layers": layers}


def mean_of_others(pairs: Tensor) -> Tensor:
    """Return the mean of a measure of pairs `(N, N)` over the others of each expert, `(N,)`."""
    return (pairs.sum(1) - pairs.diagonal()) / max(len(pairs) - 1, 1)


def interference(
    experts: Sequence[str | Path | TaskVector],
    method: MergeMethod | None = None,
    progress: Progress = iter,
    skip: bool = False,
) -> Interference:
    """Compare each pair of experts, and each expert with their merge, weight by weight.

    Args:
        experts: Directories of at least two experts, opened experts, or task vectors.
        method: Merges them; `SparseAverage` by default.
        skip: As for `merge`.

    Raises:
        ValueError: The list has fewer than two experts, or `Merged` refuses them.
    """
    merged = Merged(experts, method or SparseAverage(), skip=skip)
    if len(merged.experts) < 2:
        raise ValueError(f"{len(merged.experts)} expert has no other to be compared with; give two or more")
    layers: dict[str, Sums] = {}
    for name in progress(list(merged)):
        sums = _sums(merged.deltas_of(name), merged[name])
        block = block_of(name) or ""
        layers[block] = layers[block] + sums if block in layers else sums
    # Stored experts have names, and sums of them none.
    names = [getattr(expert, "name", f"expert {number}") for number, expert in enumerate(merged.experts, 1)]
    return Interference(names, functools.reduce(operator.add, layers.values()), layers)


def _sums(deltas: Sequence[Delta], merged: Delta) -> Sums:
    """Return the sums of one weight, over chunks in which every expert's entries stand as plain numbers."""
    count = len(deltas)
    products, both, agreeing = (torch.zeros(count, count, dtype=torch.float64) for _ in range(3))
    with chunks_of_size(max(HELD // count, 1)):
        for chunk in chunks_of(deltas):
            start, stop = chunk.span
            values = torch.zeros(count, stop - start, dtype=torch.float64)
            for own, entries in zip(values, chunk, strict=True):
                entries.write_to(own, entries.values.double())
            products += values @ values.T
            # Counts up to 2^24 are exact in float32.
            signs = values.sign().float()
            agreeing += (signs @ signs.T).double()
            moved = signs.abs_()
            both += (moved @ moved.T).double()
    along = torch.tensor([inner(merged, delta) for delta in deltas], dtype=torch.float64)
    energy = torch.tensor(merged.norm() ** 2, dtype=torch.float64)
    return Sums(products, both, (both - agreeing) / 2, along, energy)
