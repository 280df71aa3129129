"""Single entries by torch's sampled dense-dense product, on the CPU: only the kept entries of `g^T x` are computed.

Below about 7 % kept it is cheaper than the dense gradient (measured, `benchmarks/README.md`).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from modular_experts.blocks import Tile, rows_and_columns
from modular_experts.kernels.kernel import KeptGradient

__all__ = ["SampledProduct"]


class SampledProduct(KeptGradient):
    """One dot product over the tokens per kept entry."""

    name: ClassVar[str] = "sampled"

    def __init__(self, units: Tensor, shape: Sequence[int], tile: Tile) -> None:
        super().__init__(units, shape, tile)
        rows, columns = rows_and_columns(units, self.shape)
        bounds = torch.arange(self.shape[0] + 1, device=units.device)
        self.row_starts = torch.searchsorted(rows, bounds).to(torch.int32)
        self.columns = columns.to(torch.int32)

    def gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        _accept_compressed_rows()
        zeros = torch.zeros(self.units.numel(), dtype=wide)
        pattern = torch.sparse_csr_tensor(self.row_starts, self.columns, zeros, self.shape, check_invariants=False)
        return torch.sparse.sampled_addmm(pattern, grad.to(wide).T, x.to(wide), beta=0.0).values()


@functools.cache
def _accept_compressed_rows() -> None:
    """Make torch give its once-a-process beta notice for compressed sparse rows here, unheard."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(
            torch.zeros(2, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), torch.zeros(0), (1, 1)
        )
