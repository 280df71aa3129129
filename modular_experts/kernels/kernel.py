"""The contract of a kernel: the gradient of only the kept units of a weight, from a layer's input and output gradient.

For `y = x W^T` with `x` `(tokens, in)` and output gradient `g` `(tokens, out)` a kernel gives `g^T x` at the kept
units. It is made once for a support and called in every backward pass; what can be planned ahead is planned in its
constructor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

__all__ = ["KeptGradient"]


class KeptGradient(ABC):
    """Makes the gradient of the kept units.

    Args:
        units: The kept units `(k,)`, sorted: flat entries, or tiles numbered row-major over the grid that covers the
            weight.
        shape: The weight's, `(out, in)`.
        tile: Height and width of a unit; `(1, 1)` for entries, `(1, in)` for rows, `(out, 1)` for columns.
    """

    name: ClassVar[str]
    """What the argument `backend` of an expert calls it."""

    def __init__(self, units: Tensor, shape: Sequence[int], tile: tuple[int, int]) -> None:
        self.units, self.shape, self.tile = units, (shape[0], shape[1]), tile

    def saved(self, x: Tensor) -> Tensor:
        """Return what backward needs of the input `(tokens, in)`; a kernel that needs a part saves only that."""
        return x

    @abstractmethod
    def gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient of the kept units: `(k,)` for entries, else `(k, height, width)`; zero beyond the edge.

        Args:
            x: What `saved` returned.
            grad: Gradient of the output `(tokens, out)`, in the dtype of `x`.
        """
