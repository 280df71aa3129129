"""Estimates: what a merge will read and hold, weight by weight, before it begins.

Sizes come from the experts' tables and the methods' own word on what they hold; nothing is read. Time is told by
merging a few weights and throwing the result away.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from modular_experts.library import StoredExpert
from modular_experts.merger.merged import Merged
from modular_experts.methods import MergeMethod
from modular_experts.methods.chunks import chunk_size
from modular_experts.text import bytes_text

__all__ = ["WeightEstimate", "check_memory", "estimate", "largest", "seconds"]

_SCRATCH, _VALUES = 40, 8
"""Bytes per entry of a part: a few tensors of eight bytes, and the trimmed values of each expert."""
_INDEX, _ENTRY, _WRITTEN = 4, 8, 6
"""Bytes per single entry that an expert keeps: of its index, once decoded; of a copy, with its value. And bytes per
entry of the weight in which the result is written."""


@dataclass(frozen=True)
class WeightEstimate:
    """What one weight of a merge takes.

    Attributes:
        name: Its name.
        shape: Its shape.
        method: What merges it.
        experts: How many experts move it.
        read: Bytes of their deltas in the files.
        peak: Bytes of memory at most, beside the files' own pages: indices, scratch, matrices, and the result.
    """

    name: str
    shape: tuple[int, ...]
    method: MergeMethod
    experts: int
    read: int
    peak: int


def estimate(merged: Merged) -> list[WeightEstimate]:
    """Return the estimate of each weight, in the order in which they are merged."""
    sizes = [expert.stored_bytes() for expert in merged.stored]
    singles = [_single_entries(expert) for expert in merged.stored]
    spread = [_spread_at_once(expert) for expert in merged.stored]
    found = []
    for name, shape in merged.shapes().items():
        method, entries = merged.rules[name], shape.numel()
        read = [stored[name] for stored in sizes if name in stored]
        kept = sum(counts.get(name, 0) for counts in singles)
        needs = method.needs
        matrices = (needs.matrices + needs.matrices_per_expert * len(read)) * entries * 8
        matrices += needs.squares * shape[-1:].numel() ** 2 * 8
        result = min(2 * sum(read), 4 * entries) + 4 * entries  # in the file's form, and before it is put into it
        held = (_INDEX + _ENTRY * needs.copies) * kept + _WRITTEN * entries
        held += _ENTRY * sum(tiles.get(name, 0) for tiles in spread)
        peak = int(matrices + result + held + (_SCRATCH + _VALUES * len(read)) * min(chunk_size(), entries))
        found.append(WeightEstimate(name, tuple(shape), method, len(read), sum(read), peak))
    return found


def _single_entries(expert: StoredExpert) -> dict[str, int]:
    """Return how many single entries an expert keeps, by the name of the weight; tiles have few indices."""
    forms, kept = expert.forms(), expert.kept_entries()
    return {name: kept[name] for name, form in forms.items() if form == "Sparse"}


def _spread_at_once(expert: StoredExpert) -> dict[str, int]:
    """Return how many entries of tiles an expert keeps of a part, where parts have to be larger than a chunk, as with
    whole columns; each of them is held with its place.
    """
    shapes, kept, found = expert.shapes(), expert.kept_entries(), {}
    for name, (height, _) in expert.tiles().items():
        entries = shapes[name].numel()
        part = min(entries, height * shapes[name][1])
        if part > chunk_size():
            found[name] = kept[name] * part // entries
    return found


def largest(weights: Sequence[WeightEstimate]) -> WeightEstimate:
    """Return the weight that needs the most memory, the first of equals."""
    return max(weights, key=lambda weight: weight.peak)


def check_memory(weights: Sequence[WeightEstimate], limit: int) -> None:
    """Refuse a merge that needs more memory than it may have.

    Args:
        weights: From `estimate`.
        limit: Bytes, beside what Python and torch take without any merge.

    Raises:
        ValueError: The estimate of a weight is larger.
    """
    most = largest(weights)
    if most.peak > limit:
        by_parts = not (most.method.needs.matrices or most.method.needs.matrices_per_expert)
        other = "" if by_parts else "take a method that works part by part (such as SparseAverage or TIES), "
        raise ValueError(
            f"merging {most.name} {most.shape} of {most.experts} experts with {type(most.method).__name__} needs about "
            f"{bytes_text(most.peak)} of memory, and max_memory is {bytes_text(limit)}; raise it, merge fewer experts, "
            f"{other}or keep the weight at the base with per_weight"
        )


def seconds(merged: Merged, weights: Sequence[WeightEstimate], budget: float = 2.0) -> float:
    """Return about how long the merge will take, from merging weights until `budget` seconds are over.

    What happens once is counted once: the first look that some methods take at all weights, and what is compiled when
    it is first used. Then the smallest and the largest weight come first; their time is scaled by the entries.
    """
    order = sorted(weights, key=lambda weight: (weight.read, weight.name))
    order = [order[0], order[-1], *order[1:-1]] if len(order) > 1 else list(order)
    once = _seconds_of(merged, order[0])
    spent, done = 0.0, 0
    for weight in order:
        spent += _seconds_of(merged, weight)
        done += _entries(weight)
        if once + spent > budget:
            break
    return once + spent * sum(map(_entries, weights)) / done


def _seconds_of(merged: Merged, weight: WeightEstimate) -> float:
    started = time.perf_counter()
    merged[weight.name]
    return time.perf_counter() - started


def _entries(weight: WeightEstimate) -> int:
    return math.prod(weight.shape)
