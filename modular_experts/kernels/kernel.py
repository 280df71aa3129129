"""The contract of a kernel: the gradient of only the kept units of a weight, from a layer's input and output gradient.

For `y = x W^T` with `x` `(tokens, in)` and output gradient `g` `(tokens, out)` a kernel computes `g^T x` at the kept
units. An expert makes a kernel once for a support and calls it in every backward pass, so the constructor plans ahead.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

__all__ = ["KeptGradient"]


class KeptGradient(ABC):
    """Computes the gradient of the kept units.

    Args:
        units: The kept units `(k,)`, sorted: flat entries, or tiles numbered row-major over the grid that covers the
            weight.
        shape: Shape of the weight, `(out, in)`.
        tile: Height and width of a unit; `(1, 1)` for entries, `(1, in)` for rows, `(out, 1)` for columns.
    """

    name: ClassVar[str]
    """The name by which an expert's argument `backend` asks for it."""

    def __init__(self, units: Tensor, shape: Sequence[int], tile: tuple[int, int]) -> None:
        self.units, self.shape, self.tile = units, (shape[0], shape[1]), tile

    def saved(self, x: Tensor) -> Tensor:
        """Return the part of the input `(tokens, in)` that backward needs."""
        return x

    @abstractmethod
    def gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient of the kept units: `(k,)` for entries, else `(k, height, width)`; zero beyond the edge.

        Args:
            x: What `saved` returned.
            grad: Gradient of the output `(tokens, out)`, in the dtype of `x`.
        """
