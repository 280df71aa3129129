"""Expert: the trainable state for one weight, and the delta it stands for. The whole contract of a user's own type.

*Additive* experts (LoRA, most user types) own parameters beside a frozen weight. *In-place* experts (sparse, full)
train the weight itself. No model, trainer or file is known here: `injection` puts experts into layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modular_experts.deltas import Delta

__all__ = ["Expert"]


class Expert(nn.Module, ABC):
    """Owns the trainable state of one linear weight `(out, in)`; a subclass must give `__init__(weight, ...)` and
    `delta`.

    Parameters and buffers move between devices with the model but never lose precision: a float32 parameter stays
    float32 beside a bfloat16 base, so that small updates are not rounded away.
    """

    learning_rate: ClassVar[float] = 1e-3
    """Peak learning rate used with the default optimizer, AdamW."""

    trains_weight: ClassVar[bool] = False
    """Whether the layer's own weight is a trained parameter (in float32), as for a full fine-tune."""

    @abstractmethod
    def delta(self, weight: Tensor, anchor: Callable[[], Tensor]) -> Delta:
        """Return how far the weight has moved from the base.

        Args:
            weight: The layer's weight as it is now, `(out, in)`.
            anchor: Gives the weight as it was before training, `(out, in)`; it may read a file, so call it only when
                needed.

        Raises:
            NotImplementedError: The type moves no weight (it overrides `forward` only); the message says why it cannot
                be merged.
        """

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the layer's output `(..., out)` for `x` `(..., in)`; here base and delta side by side."""
        return F.linear(x, weight, bias) + self.delta(weight, lambda: weight).linear(x)

    def settings(self) -> dict[str, bool | int | float | str]:
        """Return the plain values that the expert was made with, for its record and for the summary of a run."""
        plain = {name: value for name, value in vars(self).items() if isinstance(value, bool | int | float | str)}
        return {name: value for name, value in plain.items() if not name.startswith("_") and name != "training"}

    def write(self, weight: Tensor) -> None:
        """Bring the layer's weight up to date with the trained state; additive experts have nothing to do."""

    def restore(self, weight: Tensor, anchor: Callable[[], Tensor]) -> None:
        """Give the layer's weight back as it was before training, bit for bit; additive experts never changed it."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Expert:
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if not tensor.is_floating_point() or moved.dtype == tensor.dtype:
                return moved
            return tensor.to(moved.device, torch.promote_types(tensor.dtype, moved.dtype))

        return super()._apply(keep_precision, recurse)
