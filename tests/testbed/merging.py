"""Call merge methods as the merger does: `prepare` on all weights, then `merge` with a context for each."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from modular_experts.deltas import Delta, LowRank
from modular_experts.methods import MergeMethod
from modular_experts.methods.method import Context

Stream = Sequence[Sequence[Delta]]


def merge_all(method: MergeMethod, stream: Stream) -> list[Delta]:
    """Merge several weights of the same experts; they are called "weight 0", "weight 1", ..."""
    prepared = method.prepare(stream)
    return [method.merge(deltas, Context(f"weight {n}", None, prepared)) for n, deltas in enumerate(stream)]


def merge_one(method: MergeMethod, deltas: Sequence[Delta], name: str = "") -> Delta:
    """Merge one weight."""
    return method.merge(deltas, Context(name, None, method.prepare([deltas])))


def tasks_of(method: MergeMethod, stream: Stream) -> list[list[Delta]]:
    """Return what each expert's task gets, weight by weight."""
    context = Context(prepared=method.prepare(stream))
    return [[method.per_task(deltas, place, context) for deltas in stream] for place in range(len(stream[0]))]


def assert_merged(found: Delta, expected: Any, rtol: float = 1e-7, atol: float = 1e-7) -> None:
    """Compare a merged delta with a tensor or an array in float64, entry by entry."""
    wanted = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found.dense().double(), wanted, rtol=rtol, atol=atol)


@contextmanager
def factors_only() -> Iterator[None]:
    """Let it be an error for a while to make a low-rank delta dense."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LowRank, "add_to", None)
        patch.setattr(LowRank, "dense", None)
        yield
