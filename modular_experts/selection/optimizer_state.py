"""Move, drop and measure what optimizers keep for each trained entry, when the entries that are trained change."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["carry_state", "forget_state", "optimizer_bytes"]


def forget_state(optimizers: Iterable[Optimizer], parameters: Iterable[nn.Parameter]) -> None:
    """Drop the optimizers' state of some parameters, so that they start anew."""
    parameters = list(parameters)
    for optimizer in optimizers:
        for parameter in parameters:
            optimizer.state.pop(parameter, None)


def carry_state(state: dict[str, Any], parameter: Tensor, slots: Tensor) -> None:
    """Move the optimizer's per-entry state to the new slots, in place; newcomers start from zero.

    Args:
        state: The optimizer's state of one parameter.
        parameter: The parameter, with one slot per kept unit.
        slots: For each new slot the one it had before, or -1 for a newcomer.
    """
    stays = slots >= 0
    for value in state.values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            moved = torch.zeros_like(value)
            moved[stays] = value[slots[stays]]
            value.copy_(moved)


def optimizer_bytes(optimizers: Iterable[Optimizer]) -> int:
    """Return the size of all per-entry state in bytes, without step counters."""
    states = (state for optimizer in optimizers for state in optimizer.state.values())
    tensors = (value for state in states for value in state.values() if isinstance(value, Tensor) and value.ndim > 0)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
