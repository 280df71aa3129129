"""Sparse experts train a few entries of a weight, in place, at the price of those entries."""

from collections.abc import Callable
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from modular_experts.deltas import BlockSparse, Delta, Sparse
from modular_experts.deltas.tiles import gather_tiles, index_dtype, scatter_tiles_, true_places
from modular_experts.experts.expert import InPlaceExpert
from modular_experts.experts.selectable import Granularity, Selectable
from modular_experts.masks import GradientMagnitude, GrowAndDrop, Rule, Score
from modular_experts.native.kernel import KeptGradient, computed_in, kept_linear, kept_weight
from modular_experts.native.kernel_choice import Backend, check_backend, make_kernel
from modular_experts.native.sparse_passes import carried, exchanged_slots
from modular_experts.native.transient import TransientWeight


class SparseExpert(Selectable, InPlaceExpert):
    """Trains `keep_ratio` of the entries; the others stay at the base.

    `values` holds the kept entries' distance from the base in float32, so that weight decay pulls towards the base and
    small steps survive beside a bfloat16 weight. The support starts random; `MaskSchedule` chooses it before the first
    step.

    A quantised weight stays as it is: each pass dequantises it and adds the values at their places.

    Args:
        weight: The base weight `(out, in)`.
        keep_ratio: Share of the entries kept, in (0, 1].
        granularity: `element` keeps single entries, `block` square tiles of neighbouring entries, `row` and `column`
            whole outputs and inputs of the layer, which train at the price of a slice.
        block_size: Side of a tile. Where it does not divide the weight, the last tiles reach over the edge.
        backend: Kernel that computes the kept gradient: `auto` chooses by the kind of unit, share kept, device and
            dtype (the rule is in `native/kernel_choice.py`; the run's summary shows its choice). By name: `sampled` and
            `native` for entries, `block_rows`, `native` and `triton` (CUDA) for tiles, `slices` for rows and columns,
            `dense` for all.
    """

    learning_rate: ClassVar[float] = 1e-3
    score: ClassVar[Score] = GradientMagnitude()
    rule: ClassVar[Rule] = GrowAndDrop()
    chooses_in_step: ClassVar[bool] = True
    takes_transient: ClassVar[bool] = True

    _written: tuple[int, torch.dtype] | None = None  # version of `values` that the weight holds, and in which dtype
    _kernel: tuple[tuple[object, ...], KeptGradient] | None = None  # the support and dtype of the plan, and the kernel

    def __init__(
        self,
        weight: Tensor,
        keep_ratio: float = 0.05,
        granularity: Granularity = "element",
        block_size: int = 16,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(weight, keep_ratio, granularity, block_size)
        check_backend(backend, self.shape, self.tile)
        self.backend = backend
        _count_steps_as_changes()
        tile = () if self.tile == (1, 1) else self.tile
        dtype = torch.promote_types(weight.dtype, torch.float32)
        indices = torch.randperm(self.units)[: self.kept_units].sort().values.to(weight.device, index_dtype(self.shape))
        self.values = nn.Parameter(torch.zeros(self.kept_units, *tile, dtype=dtype, device=weight.device))
        self.indices: Tensor
        self.register_buffer("indices", indices)
        self.anchor: Tensor
        self.register_buffer("anchor", self.base_of(weight.detach(), indices))

    # torch.compile could fuse nothing here: the layer writes into the weight and loops over rows of tiles.
    @torch.compiler.disable
    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = self._with_values(weight)
        if self.probe is not None:
            return kept_linear(x, weight, bias, self.probe.leaf, self.probe)
        return kept_linear(x, weight, bias, self.values, self.chooser or self.kernel(computed_in(weight)))

    def moved(self, weight: Tensor) -> Tensor:
        # No product is computed, for which a kernel would have to plan.
        kernel = self.chooser or KeptGradient(self.indices, self.shape, self.tile)
        return kept_weight(self._with_values(weight), self.values, kernel)

    def settings(self) -> dict[str, bool | int | float | str]:
        return super().settings() | {"backend": self.kernel(self.anchor.dtype).name}

    def delta(self, weight: Tensor, anchor: Callable[[], Tensor]) -> Sparse | BlockSparse:
        return (Sparse if self.tile == (1, 1) else BlockSparse)(self.indices, self.values, self.shape)

    def scored(self, weight: Tensor) -> tuple[Tensor, Delta]:
        return super().scored(self._with_values(weight))

    def _with_values(self, weight: Tensor) -> Tensor:
        """Return the weight with the values in it."""
        if isinstance(weight, TransientWeight):
            return weight.plus(self.delta(weight, lambda: weight))
        if self._written != (self.values._version, weight.dtype):
            self.write(weight)
        return weight

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        """Put `cast(anchor + values)` into the weight.

        Every forward pass does this when the values have changed; call it after a change through `.data`, which torch
        does not count, and to read the weight itself after a step.
        """
        if not isinstance(weight, TransientWeight):
            self._write(weight, (self.anchor + self.values).to(weight.dtype), self.indices)
        self._written = (self.values._version, weight.dtype)

    @torch.no_grad()
    def restore(self, weight: Tensor, anchor: Callable[[], Tensor] | None = None) -> None:
        if not isinstance(weight, TransientWeight):
            self._write(weight, self.anchor.to(weight.dtype), self.indices)
        self._written = None

    @torch.no_grad()
    def reanchor(self, weight: Tensor) -> None:
        self.anchor.copy_(self.base_of(weight, self.indices))
        self.write(weight)

    @property
    def packed(self) -> nn.Parameter:
        return self.values

    def support_units(self) -> Tensor:
        return self.indices

    def unit_change(self) -> Tensor:
        return self.values.detach().abs().flatten(1).sum(1) if self.values.ndim > 1 else self.values.detach().abs()

    @torch.no_grad()
    def reselect(self, weight: Tensor, units: Tensor) -> tuple[Tensor, Tensor]:
        # Only what is exchanged is read and written: most units stay, and the weight holds their values already.
        is_written = self._written == (self.values._version, weight.dtype)
        slots, left = exchanged_slots(self.indices, units)
        if not isinstance(weight, TransientWeight):
            self._write(weight, self.anchor[left].to(weight.dtype), self.indices[left])
            anchor = carried(self.anchor, slots)
            new = true_places(slots < 0)
            anchor[new] = self._read(weight, units[new])
            self.anchor.copy_(anchor)
        self.values.copy_(carried(self.values, slots))
        self.indices.copy_(units)
        if is_written:
            self._written = (self.values._version, weight.dtype)
        else:
            self.write(weight)
        return slots, left

    def kernel(self, dtype: torch.dtype) -> KeptGradient:
        """Return the kernel for a layer that computes in `dtype`; it is planned once for each support."""
        wanted = (self.indices._version, self.indices.device, dtype)
        if self._kernel is None or self._kernel[0] != wanted or self._kernel[1].units is not self.indices:
            self._kernel = (wanted, make_kernel(self.backend, self.indices, self.shape, self.tile, dtype))
        return self._kernel[1]

    @torch.no_grad()
    def resize(self, weight: Tensor, units: Tensor) -> None:
        self.restore(weight)
        self._kept_units = units.numel()
        self._kernel = None
        self.values = nn.Parameter(self.values.new_zeros(units.numel(), *self.values.shape[1:]))
        self.indices = units.to(self.indices)
        self.anchor = self.base_of(weight, self.indices)

    def base_of(self, weight: Tensor, units: Tensor) -> Tensor:
        """Return the base's entries, which nothing overwrites in a weight that is read anew."""
        return weight.new_empty(0) if isinstance(weight, TransientWeight) else self._read(weight, units)

    def _read(self, weight: Tensor, units: Tensor) -> Tensor:
        return weight.reshape(-1)[units] if self.tile == (1, 1) else gather_tiles(weight, units, self.tile)

    def _write(self, weight: Tensor, kept: Tensor, units: Tensor) -> None:
        if self.tile == (1, 1):
            weight.view(-1)[units] = kept
        else:
            scatter_tiles_(weight, units, kept)

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        _count_steps_as_changes()
        self._written = self._kernel = None  # a copy's version counters start anew


def _count_change(optimizer: Optimizer, *arguments: object) -> None:
    """Count a step as a change, which torch does not where an optimizer is fused or writes through `.data`."""
    for group in optimizer.param_groups:
        # The others may lie in graphs that are still to run backward.
        moved = [parameter for parameter in group["params"] if parameter.grad is not None]
        torch.autograd.graph.increment_version(moved)


@cache
def _count_steps_as_changes() -> None:
    """Tell all optimizers of this process, which has a sparse expert from now on."""
    register_optimizer_step_post_hook(_count_change)
