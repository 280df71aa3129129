"""Define the contract of a kernel, and the layers that call one for the gradient of their kept units."""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from modular_experts.deltas.tiles import gather_tiles


class KeptGradient:
    """Computes `g^T x` at the kept units, for inputs `x` `(tokens, in)` and the output's gradient `g` `(tokens, out)`.

    This one computes all of it, and reads the kept units, of any kind; a subclass computes less.

    An expert makes a kernel once for a support and calls it in every backward pass, so the constructor plans ahead.

    Args:
        units: The kept units `(k,)`, sorted: flat entries, or tiles numbered row-major over the grid that covers the
            weight.
        shape: Shape of the weight, `(out, in)`.
        tile: Height and width of a unit; `(1, 1)` for entries, `(1, in)` for rows, `(out, 1)` for columns.
    """

    name: ClassVar[str] = "dense"
    """The name by which an expert's argument `backend` asks for it."""

    def __init__(self, units: Tensor, shape: Sequence[int], tile: tuple[int, int]) -> None:
        self.units = units
        self.shape = (shape[0], shape[1])
        self.tile = tile

    def saved(self, x: Tensor) -> Tensor:
        """Return the part of the input `(tokens, in)` that backward needs."""
        return x

    def gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient of the kept units: `(k,)` for entries, else `(k, height, width)`; zero beyond the edge.

        `x` is the result of `saved`, and `grad` has its dtype.
        """
        return self.of_dense(grad.T @ x)

    def of_dense(self, gradient: Tensor) -> Tensor:
        """Return the same from the gradient of the whole weight, `(out, in)`."""
        return gradient.view(-1)[self.units] if self.tile == (1, 1) else gather_tiles(gradient, self.units, self.tile)


def kept_linear(x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, kernel: KeptGradient) -> Tensor:
    """Return `x W^T + bias` for a frozen weight into which `values`, which receive the kept gradient, are written."""
    dtype = computed_in(weight)
    if dtype != weight.dtype:
        x = x.to(dtype)
        weight = weight.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
    return _KeptLinear.apply(x, weight, bias, values, kernel)


def kept_weight(weight: Tensor, values: Tensor, kernel: KeptGradient) -> Tensor:
    """Return a frozen weight, into which `values`, which receive the kept gradient, are written, for any operator."""
    return _KeptWeight.apply(weight, values, kernel)


def computed_in(weight: Tensor) -> torch.dtype:
    """Return the dtype in which a layer of this weight computes, autocast's where it is on."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


class _KeptLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, values, kernel):
        saved = kernel.saved(x.reshape(-1, x.shape[-1])) if values.requires_grad else None
        ctx.save_for_backward(saved, weight)
        ctx.kernel = kernel
        ctx.dtype = values.dtype
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        saved, weight = ctx.saved_tensors
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        flat = grad.reshape(-1, grad.shape[-1])
        # The bias may have an expert of its own.
        grad_bias = flat.sum(0) if ctx.needs_input_grad[2] else None
        kept = ctx.kernel.gradient(saved, flat).to(ctx.dtype) if ctx.needs_input_grad[3] else None
        return grad_x, None, grad_bias, kept, None


class _KeptWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, values, kernel):
        ctx.kernel = kernel
        ctx.dtype = values.dtype
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad):
        return None, ctx.kernel.of_dense(grad.contiguous()).to(ctx.dtype), None


def contiguous_rows(matrix: Tensor) -> Tensor:
    """Return the matrix with the values of each row beside each other in memory."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
