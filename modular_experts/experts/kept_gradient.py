"""The gradient of only the kept entries of a weight: a linear layer whose backward never needs the dense one.

For `y = x W^T` with `x` `(tokens, in)` and output gradient `g` `(tokens, out)`, the kept entries of `g^T x` are
* entries: a sampled dense-dense product up to `SAMPLED_BELOW` kept, else the dense gradient of this one layer,
gathered;
* tiles: one small matrix product per row of tiles, over only the columns of `x` that the row keeps.
Both need a third of LoRA's extra operations at the same parameter count. Native and CUDA kernels go behind the same
functions.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from modular_experts.blocks import block_grid, gather_blocks

__all__ = ["SAMPLED_BELOW", "kept_linear", "tile_rows"]

SAMPLED_BELOW = 0.07
"""Share of kept entries above which a dense gradient, gathered, is cheaper on a CPU than the sampled product."""

TileRows = list[tuple[int, int, int]]
"""For each row of tiles that keeps any: its number, and the first and last + 1 of its slots."""


def kept_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, gradient: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Return `x W^T + bias` for a weight into which `values` are already written.

    Args:
        x: Input `(..., in)`.
        weight: The effective weight `(out, in)`; frozen.
        bias: `(out,)` or none; frozen.
        values: The trained parameter that receives the kept gradient.
        gradient: Gives the kept gradient in the shape of `values` from `x` `(tokens, in)` and `g` `(tokens, out)`.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)
    return _KeptLinear.apply(x, weight, bias, values, gradient)


class _KeptLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, values, gradient):
        ctx.save_for_backward(x, weight)
        ctx.gradient, ctx.dtype = gradient, values.dtype
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        kept = None
        if ctx.needs_input_grad[3]:
            kept = ctx.gradient(x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])).to(ctx.dtype)
        return grad_x, None, None, kept, None


def entry_gradient(x: Tensor, grad: Tensor, indices: Tensor) -> Tensor:
    """Return the gradient `(n,)` at sorted flat `indices` of the weight."""
    rows, columns = grad.shape[1], x.shape[1]
    if x.device.type == "cpu" and indices.numel() < SAMPLED_BELOW * rows * columns:
        return _sampled_product(x, grad, indices)
    return (grad.T @ x).view(-1)[indices]


def _sampled_product(x: Tensor, grad: Tensor, indices: Tensor) -> Tensor:
    rows, columns = grad.shape[1], x.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    bounds = torch.arange(rows + 1, device=x.device) * columns
    row_starts = torch.searchsorted(indices.long(), bounds).to(torch.int32)
    _accept_compressed_rows()
    pattern = torch.sparse_csr_tensor(
        row_starts,
        (indices % columns).to(torch.int32),
        torch.zeros(indices.numel(), dtype=wide),
        (rows, columns),
        check_invariants=False,
    )
    return torch.sparse.sampled_addmm(pattern, grad.to(wide).T, x.to(wide), beta=0.0).values()


@functools.cache
def _accept_compressed_rows() -> None:
    """Make torch give its once-a-process beta notice for compressed sparse rows here, unheard."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(
            torch.zeros(2, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), torch.zeros(0), (1, 1)
        )


def tile_rows(blocks: Tensor, shape: Sequence[int], size: int) -> TileRows:
    """Return the plan of `tile_gradient`: which slots lie in which row of tiles."""
    rows, counts = torch.unique_consecutive(blocks.long() // block_grid(shape, size)[1], return_counts=True)
    ends = counts.cumsum(0)
    return list(zip(rows.tolist(), (ends - counts).tolist(), ends.tolist(), strict=True))


def tile_gradient(x: Tensor, grad: Tensor, blocks: Tensor, size: int, plan: TileRows) -> Tensor:
    """Return the gradient `(n, size, size)` of the kept tiles; it is zero beyond the weight's edge."""
    if x.device.type != "cpu":
        return gather_blocks(grad.T @ x, blocks, size)
    tall, wide = block_grid((grad.shape[1], x.shape[1]), size)
    panels = (
        _widened(x, wide * size).T.contiguous().view(wide, size, -1)
    )  # a kept tile's inputs lie together: half the time
    grad, columns = _widened(grad, tall * size), blocks.long() % wide
    out = torch.empty(blocks.numel(), size, size, dtype=x.dtype)
    for row, start, end in plan:
        inputs = panels[columns[start:end]].view(-1, x.shape[0])
        product = inputs @ grad[:, row * size : (row + 1) * size]
        out[start:end] = product.view(end - start, size, size).transpose(1, 2)
    return out


def _widened(matrix: Tensor, width: int) -> Tensor:
    """Return the matrix with columns of zeros up to a width; itself where it has them all."""
    return matrix if matrix.shape[1] == width else F.pad(matrix, (0, width - matrix.shape[1]))
