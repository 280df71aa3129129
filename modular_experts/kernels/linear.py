"""A linear layer with kept entries: one matrix product forward, and backward only the gradients that somebody needs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from modular_experts.kernels.kernel import KeptGradient

__all__ = ["computed_in", "kept_linear"]


def kept_linear(x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, kernel: KeptGradient) -> Tensor:
    """Return `x W^T + bias` for a weight into which `values` are already written.

    Args:
        x: Input `(..., in)`.
        weight: The effective weight `(out, in)`; frozen.
        bias: `(out,)` or None; frozen.
        values: The trained parameter that receives the kept gradient.
        kernel: Computes the kept gradient, in the shape of `values`.
    """
    dtype = computed_in(weight)
    if dtype != weight.dtype:
        x, weight, bias = x.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)
    return _KeptLinear.apply(x, weight, bias, values, kernel)


def computed_in(weight: Tensor) -> torch.dtype:
    """Return the dtype in which a layer of this weight computes: autocast's where it is on, else the weight's own."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


class _KeptLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, values, kernel):
        saved = kernel.saved(x.reshape(-1, x.shape[-1])) if values.requires_grad else None
        ctx.save_for_backward(saved, weight)
        ctx.kernel, ctx.dtype = kernel, values.dtype
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        saved, weight = ctx.saved_tensors
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        kept = None
        if ctx.needs_input_grad[3]:
            kept = ctx.kernel.gradient(saved, grad.reshape(-1, grad.shape[-1])).to(ctx.dtype)
        return grad_x, None, None, kept, None
