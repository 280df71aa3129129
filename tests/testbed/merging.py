"""Call merge methods as the merger does: `prepare` on all weights, then `merge` with a context for each."""

from collections.abc import Sequence

from modular_experts.deltas import Delta
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
