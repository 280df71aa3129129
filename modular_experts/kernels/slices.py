"""Whole rows and whole columns: one plain matrix product over a slice of the output gradient, or of the input.

This is the physical limit (the structured choice of S2FT, arXiv 2412.06289). Kept columns also need only their part of
the input in backward, so the rest of it is not saved.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from modular_experts.kernels.kernel import KeptGradient

__all__ = ["KeptColumns", "KeptRows"]


class KeptRows(KeptGradient):
    """`g[:, rows]^T x`."""

    name: ClassVar[str] = "slices"

    def gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        return (grad[:, self.units].T @ x).unsqueeze(1)


class KeptColumns(KeptGradient):
    """`g^T x[:, columns]`, column by column."""

    name: ClassVar[str] = "slices"

    def saved(self, x: Tensor) -> Tensor:
        return x[:, self.units]

    def gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        return (x.T @ grad).unsqueeze(2)
