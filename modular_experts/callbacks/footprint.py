"""Footprint: what training holds beside the model - the optimizer's state, and memory in use at its highest."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["MemoryWatch", "optimizer_bytes"]

_STATM = Path("/proc/self/statm")


def optimizer_bytes(optimizers: Iterable[Optimizer]) -> int:
    """Return the bytes of all per-entry state; step counters are left out."""
    states = (state for optimizer in optimizers for state in optimizer.state.values())
    tensors = (value for state in states for value in state.values() if isinstance(value, Tensor) and value.ndim > 0)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class MemoryWatch:
    """The memory in use above that at the start, at its highest among the moments looked at.

    On a GPU it is what torch has allocated there, else the resident memory of the process, where the system tells it.

    Args:
        device: Where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start = self._used()
        self.most = 0

    def look(self) -> None:
        """Take note of the memory in use now."""
        self.most = max(self.most, self._used() - self.start)

    def _used(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        if not _STATM.exists():
            return 0
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
