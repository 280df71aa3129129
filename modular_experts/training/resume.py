"""Collect and restore the random state of a run; Lightning's checkpoints leave it out, so dropout would differ.

Every rank has a state of its own, and rank 0 writes the checkpoint of all, so the states are gathered. They are plain
numbers and tensors, so that a checkpoint loads with `weights_only=True`.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import distributed

__all__ = ["collect_random_states", "restore_random_states"]


def collect_random_states() -> list[dict[str, Any]]:
    """Return the state of each rank's generators, on every rank."""
    version, numbers, gauss = random.getstate()
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": [version, list(numbers), gauss]}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    if not _is_distributed():
        return [state]
    states: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(states, state)
    return states


def restore_random_states(states: list[dict[str, Any]]) -> None:
    """Set this rank's generators; a rank that the checkpoint has no state for keeps its own."""
    rank = distributed.get_rank() if _is_distributed() else 0
    if rank >= len(states):
        return
    state = states[rank]
    torch.set_rng_state(state["torch"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()
