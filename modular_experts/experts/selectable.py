"""Selectable experts: those that train a chosen part of a weight. How much, in which units, and how a choice is scored.

The choosing itself belongs to `masks` (rules and scores) and to the `MaskSchedule` callback (when, on which batches).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modular_experts.blocks import Tile, block_grid, block_sums
from modular_experts.deltas import BlockSparse, Delta, Sparse
from modular_experts.experts.expert import Expert
from modular_experts.masks import Rule, Score

__all__ = ["Granularity", "Selectable"]

Granularity = Literal["element", "block", "row", "column"]


class Selectable(Expert):
    """An expert whose support is a fixed number of *units* of a weight: single entries, square tiles, rows or columns.

    While `probe` is set, a backward pass hands the dense gradient `(out, in)` of the weight, in float32, to its
    function and frees it: a scoring pass holds one layer's gradient at a time. Its scalar is what to differentiate for.
    """

    score: ClassVar[Score]
    rule: ClassVar[Rule]
    """What `MaskSchedule` uses where it is not told otherwise."""
    selects_at_start: ClassVar[bool] = True

    probe: tuple[Tensor, Callable[[Tensor], None]] | None = None

    def __init__(self, weight: Tensor, keep_ratio: float, granularity: Granularity, block_size: int) -> None:
        super().__init__()
        if not 0 < keep_ratio <= 1:
            raise ValueError(f"keep_ratio={keep_ratio} is outside (0, 1]; 0.05 keeps five of a hundred entries")
        if granularity == "block" and block_size < 2:
            raise ValueError(
                f"block_size={block_size} must be at least 2; for single entries use granularity='element'"
            )
        if granularity == "block" and block_size > min(weight.shape):
            raise ValueError(
                f"block_size={block_size} is larger than a side of the weight {tuple(weight.shape)}; "
                f"use at most {min(weight.shape)}, or granularity='element'"
            )
        self.keep_ratio, self.granularity = keep_ratio, granularity
        self.shape = weight.shape
        if granularity == "block":
            self.block_size = block_size
        tiles = {"block": (block_size, block_size), "row": (1, self.shape[1]), "column": (self.shape[0], 1)}
        self.tile: Tile = tiles.get(granularity, (1, 1))

    @property
    def units(self) -> int:
        """Number of entries, tiles, rows or columns of the weight."""
        return math.prod(block_grid(self.shape, self.tile))

    @property
    def kept_units(self) -> int:
        """Number of them that are kept: at least one."""
        wanted = int(self.keep_ratio * self.shape.numel() / math.prod(self.tile))
        return min(max(wanted, 1), self.units)

    def unit_scores(self, scores: Tensor) -> Tensor:
        """Return one score per unit `(units,)` from one per entry `(out, in)`; a tile's is the sum of its entries."""
        return scores.reshape(-1) if self.tile == (1, 1) else block_sums(scores, self.tile)

    @abstractmethod
    def support_units(self) -> Tensor:
        """Return the kept units `(k,)`, sorted."""

    @abstractmethod
    def unit_change(self) -> Tensor:
        """Return how far each kept unit has moved `(k,)`: the sum of its entries' magnitudes."""

    @abstractmethod
    def scored_delta(self, weight: Tensor) -> Delta:
        """Return the delta that a score is to see."""

    @abstractmethod
    def reselect(self, weight: Tensor, units: Tensor) -> Tensor:
        """Keep other units, in place; return for each new slot `(k,)` the slot it had before, or -1 for a newcomer."""

    def probed(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the layer's output; in backward, the weight's gradient goes to `probe`."""
        assert self.probe is not None
        return _ProbedLinear.apply(x, weight, bias, *self.probe)

    @property
    def packed(self) -> nn.Parameter | None:
        """The trained parameter with one slot per kept unit, if there is one: its optimizer state moves with the
        slots.
        """
        return None

    def sparse_form(self, units: Tensor, values: Tensor) -> Sparse | BlockSparse:
        """Return values at kept units as a delta: `(k,)` for entries, `(k, height, width)` for tiles."""
        return (Sparse if self.tile == (1, 1) else BlockSparse)(units, values, self.shape)


class _ProbedLinear(torch.autograd.Function):
    """A frozen linear layer whose backward also makes the weight's gradient and gives it away at once.

    `leaf` is a scalar that requires a gradient, so that backward comes here even where the input needs none.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, leaf, probe):
        ctx.save_for_backward(x, weight)
        ctx.probe = probe
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        ctx.probe((flat.T @ x.reshape(-1, x.shape[-1])).to(torch.promote_types(flat.dtype, torch.float32)))
        return grad @ weight, None, None, grad.new_zeros(()), None


def carried_slots(before: Tensor, after: Tensor) -> Tensor:
    """Return for each sorted unit of `after` its slot in the sorted `before`, or -1 where it is new."""
    slots = torch.searchsorted(before, after).clamp(max=before.numel() - 1)
    return torch.where(before[slots] == after, slots, -1)
