"""The paper's own algorithm, dense and masked: train a dense change D, show only `D * M` (arXiv 2507.07140)."""

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modular_experts.deltas import BlockSparse, Dense, Sparse
from modular_experts.deltas.tiles import gather_tiles, index_dtype, scatter_tiles_
from modular_experts.experts.selectable import Granularity, Selectable
from modular_experts.masks import ConnectionSensitivity, Reselect, Rule, Score
from modular_experts.native.kernel import kept_linear
from modular_experts.native.sparse_passes import exchanged_slots


class MaskedExpert(Selectable):
    """Trains all of D and hides what the mask leaves out: `y = x W^T + x (D * M)^T`.

    An entry that leaves the mask is hidden: it gets no gradient, but an optimizer with moments moves it on, as in the
    authors' code. It counts in the next scoring pass (which takes `M = 1`), and resumes from its value when it comes
    back; only the values inside of the final mask are exported. `MaskSchedule` re-selects by the
    paper's signed score every 100 optimizer steps of the first epoch, then freezes.

    Args:
        weight: The base weight `(out, in)`.
        keep_ratio: Share of the entries kept after the first selection, in (0, 1]; the paper's best is 0.1.
        granularity: `element` keeps single entries, `block` true two-dimensional tiles (the reference code's tiles are
            strided for weights that are not square), `row` and `column` whole outputs and inputs.
        block_size: Side of a tile.
        dense_start: Start with all of D visible, as the paper and its code do. Otherwise the mask starts random, with
            `keep_ratio` kept from the first step.
    """

    learning_rate: ClassVar[float] = 1e-3
    score: ClassVar[Score] = ConnectionSensitivity()
    rule: ClassVar[Rule] = Reselect()
    selects_at_start: ClassVar[bool] = False  # D is zero at the start, and so is every score

    def __init__(
        self,
        weight: Tensor,
        keep_ratio: float = 0.1,
        granularity: Granularity = "element",
        block_size: int = 16,
        dense_start: bool = True,
    ) -> None:
        super().__init__(weight, keep_ratio, granularity, block_size)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.change = nn.Parameter(torch.zeros(self.shape, dtype=dtype, device=weight.device))
        self.mask: Tensor
        self.register_buffer("mask", torch.ones(self.shape, dtype=torch.bool, device=weight.device))
        if not dense_start:
            self._show(torch.randperm(self.units)[: self.kept_units].to(weight.device))

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        base = F.linear(x, weight, bias)
        wide = x.to(self.change.dtype)
        if self.probe is not None:
            scored = kept_linear(wide, self.change.detach(), None, self.probe.leaf, self.probe)
            return base + scored.to(base.dtype)
        return base + F.linear(wide, self.change * self.mask).to(base.dtype)

    def delta(self, weight: Tensor, anchor: Callable[[], Tensor]) -> Sparse | BlockSparse | Dense:
        if bool(self.mask.all()):
            return Dense(self.change)
        units = self.support_units()
        if self.tile == (1, 1):
            return Sparse(units, self.change.view(-1)[units], self.shape)
        return BlockSparse(units, gather_tiles(self.change * self.mask, units, self.tile), self.shape)

    def support_units(self) -> Tensor:
        shown = self.unit_scores(self.mask.to(torch.float32)) > 0
        return shown.nonzero().view(-1).to(index_dtype(self.shape))

    def unit_change(self) -> Tensor:
        return self.unit_scores((self.change.detach() * self.mask).abs())[self.support_units().long()]

    def scored(self, weight: Tensor) -> tuple[Tensor, Dense]:
        return weight + self.change.detach(), Dense(self.change.detach())

    def reselect(self, weight: Tensor, units: Tensor) -> tuple[Tensor, Tensor]:
        before = self.support_units()
        self._show(units)
        return exchanged_slots(before, units)

    @torch.no_grad()
    def resize(self, weight: Tensor, units: Tensor) -> None:
        self._kept_units = units.numel()
        self.change.zero_()
        self._show(units)

    def _show(self, units: Tensor) -> None:
        self.mask.zero_()
        if self.tile == (1, 1):
            self.mask.view(-1)[units.long()] = True
        else:
            shown = torch.ones(units.numel(), *self.tile, dtype=torch.bool, device=units.device)
            scatter_tiles_(self.mask, units, shown)
