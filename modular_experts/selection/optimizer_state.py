"""Moments: what an optimizer remembers of each entry, when the entries that are trained change."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["carry_moments", "forget_moments"]


def forget_moments(optimizers: Iterable[Optimizer], parameters: Iterable[nn.Parameter]) -> None:
    """Let the optimizers start anew for some parameters."""
    parameters = list(parameters)
    for optimizer in optimizers:
        for parameter in parameters:
            optimizer.state.pop(parameter, None)


def carry_moments(state: dict[str, Any], parameter: Tensor, slots: Tensor) -> None:
    """Move the optimizer's per-entry state to the new slots, in place; newcomers start from zero.

    Args:
        state: The optimizer's state of one parameter.
        parameter: It, with one slot per kept unit.
        slots: For each new slot the one it had before, or -1 for a newcomer.
    """
    stays = slots >= 0
    for value in state.values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            moved = torch.zeros_like(value)
            moved[stays] = value[slots[stays]]
            value.copy_(moved)
