"""The dense gradient of this one layer, gathered: the way that always works, for any unit, share kept and device.

It costs the operations of a full fine-tune, but the dense gradient lives only inside this layer's backward pass.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from modular_experts.blocks import gather_blocks
from modular_experts.kernels.kernel import KeptGradient

__all__ = ["DenseGathered"]


class DenseGathered(KeptGradient):
    """Makes all of `g^T x` and keeps what is kept."""

    name: ClassVar[str] = "dense"

    def gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        dense = grad.T @ x
        return dense.view(-1)[self.units] if self.tile == (1, 1) else gather_blocks(dense, self.units, self.tile)
