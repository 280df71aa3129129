"""The base class of expert types that train a chosen part of a weight: its size, its units, hooks of a selection."""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from modular_experts.deltas import Delta
from modular_experts.deltas.tiles import Tile, kept_count, tile_grid, tile_sums
from modular_experts.experts.expert import Expert
from modular_experts.masks import Rule, Score
from modular_experts.native.kernel import KeptGradient

Granularity = Literal["element", "block", "row", "column"]


class Selectable(Expert):
    """An expert whose support is a fixed number of *units* of a weight: single entries, square tiles, rows or columns.

    While `probe` is set, backward hands the dense gradient of the weight `(out, in)`, in float32, to the probe and
    frees it, so that a scoring pass over one batch holds one layer's gradient at a time.
    """

    score: ClassVar[Score]
    rule: ClassVar[Rule]
    """The defaults of `MaskSchedule` for this type."""
    selects_at_start: ClassVar[bool] = True

    probe: "Probe | None" = None
    chooses_in_step: ClassVar[bool] = False
    """Whether the layer can choose its support inside a training step: its forward pass asks `chooser`."""
    chooser: KeptGradient | None = None
    """Makes the gradient of the kept units in the kernel's place, in the step at which the support is chosen."""

    def __init__(self, weight: Tensor, keep_ratio: float, granularity: Granularity, block_size: int) -> None:
        super().__init__()
        if not 0 < keep_ratio <= 1:
            raise ValueError(f"keep_ratio={keep_ratio} is outside (0, 1]; 0.05 keeps five of a hundred entries")
        self.keep_ratio = keep_ratio
        self.granularity = granularity
        self.shape = weight.shape
        if granularity == "block":
            if not 2 <= block_size <= min(weight.shape):
                raise ValueError(
                    f"block_size={block_size} is outside 2..{min(weight.shape)} for a weight of shape "
                    f"{tuple(weight.shape)}; for single entries use granularity='element'"
                )
            self.block_size = block_size
        tiles = {"block": (block_size, block_size), "row": (1, self.shape[1]), "column": (self.shape[0], 1)}
        self.tile: Tile = tiles.get(granularity, (1, 1))
        self._kept_units = min(kept_count(keep_ratio, self.shape.numel() / math.prod(self.tile)), self.units)

    @property
    def units(self) -> int:
        """Number of entries, tiles, rows or columns of the weight."""
        return math.prod(tile_grid(self.shape, self.tile))

    @property
    def kept_units(self) -> int:
        """Number of kept units: by the keep ratio, rounded down but at least one, until `resize`."""
        return self._kept_units

    def unit_scores(self, scores: Tensor) -> Tensor:
        """Return one score per unit `(units,)` from one per entry `(out, in)`: the sum of its entries' scores."""
        return scores.reshape(-1) if self.tile == (1, 1) else tile_sums(scores, self.tile)

    @abstractmethod
    def support_units(self) -> Tensor:
        """Return the kept units `(k,)`, sorted."""

    @abstractmethod
    def unit_change(self) -> Tensor:
        """Return how far each kept unit has moved `(k,)`: the sum of its entries' magnitudes."""

    def scored(self, weight: Tensor) -> tuple[Tensor, Delta]:
        """Return what a score gets: the weight as the layer uses it, `(out, in)`, and its delta."""
        return weight, self.delta(weight, lambda: weight)

    @abstractmethod
    def reselect(self, weight: Tensor, units: Tensor) -> tuple[Tensor, Tensor]:
        """Keep other units, in place; return what `exchanged_slots` returns of those before and these."""

    @abstractmethod
    def resize(self, weight: Tensor, units: Tensor) -> None:
        """Keep these units, whatever their number, with values that start anew; only before an optimizer is made."""

    def size_like(self, weight: Tensor, state: Mapping[str, Tensor]) -> None:
        if self.packed is not None and "indices" in state:
            units = torch.arange(min(state["indices"].numel(), self.units), device=weight.device)
            if units.numel() != self.kept_units:
                self.resize(weight, units)

    @property
    def packed(self) -> nn.Parameter | None:
        """The trained parameter with one slot for each kept unit, or None; its optimizer state moves with the slots."""
        return None


@dataclass(eq=False)
class Probe(KeptGradient):
    """The receiver of a weight's dense gradient `(out, in)`, which a scoring pass puts into an expert as a kernel."""

    receive: Callable[[Tensor], None]
    leaf: Tensor
    """A scalar that requires a gradient, so that backward reaches the layer even if its input needs none."""
    is_reached: bool = False
    """Whether the forward pass came to the layer."""
    total: Tensor | None = None
    """The sum over those calls of the layer that backward has come to."""

    def __post_init__(self) -> None:
        # Autograd calls it when the scalar has its gradient from all calls of the layer.
        self.leaf.register_hook(self._give)

    def saved(self, x: Tensor) -> Tensor:
        self.is_reached = True
        return x

    def of_dense(self, gradient: Tensor) -> Tensor:
        """Add up the gradient of one call of the layer; return the scalar's."""
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        self.total = gradient if self.total is None else self.total.add_(gradient)
        return gradient.new_zeros(())

    def _give(self, gradient: Tensor) -> None:
        assert self.total is not None
        total = self.total
        self.total = None
        self.receive(total)
