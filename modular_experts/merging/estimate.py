"""Estimate what a merge will read and hold in memory, from the tables of the experts' files and methods' `needs`."""

from collections.abc import Sequence
from dataclasses import dataclass

from modular_experts.library import StoredExpert
from modular_experts.merging.merged import Merged
from modular_experts.methods import MergeMethod
from modular_experts.methods.chunks import chunk_size
from modular_experts.text import bytes_text

# Bytes of each entry of a chunk: a few tensors of eight bytes, and the pruned values of each expert.
_SCRATCH = 40
_VALUES = 8
# Bytes of each single entry that an expert keeps: its decoded index, and a copy of index and value.
_INDEX = 4
_COPY = 8
# Bytes of each entry of the weight while the result is written.
_WRITTEN = 6


@dataclass(frozen=True)
class WeightEstimate:
    """The cost of merging one weight: how many experts move it, and in bytes their deltas and the peak of memory.

    The peak leaves out the pages of the files.
    """

    name: str
    shape: tuple[int, ...]
    method: MergeMethod
    experts: int
    read: int
    peak: int


def estimate_merge(merged: Merged) -> list[WeightEstimate]:
    """Estimate each weight of a merge."""
    sizes = [expert.stored_bytes() for expert in merged.stored]
    tables = [(expert.forms(), expert.kept_entries()) for expert in merged.stored]
    spread = [_spread_at_once(expert) for expert in merged.stored]
    weights = []
    for name, shape in merged.shapes().items():
        method = merged.rules[name]
        needs = method.needs
        entries = shape.numel()
        read = [stored[name] for stored in sizes if name in stored]
        # Tiles have few indices, so only single entries count.
        kept = [counts[name] for forms, counts in tables if forms.get(name) == "Sparse"]
        single = sum(kept)
        # A method that goes chunk by chunk makes single entries of single entries, each with its index.
        is_sparse = len(kept) == len(read) and not (needs.matrices or needs.matrices_per_expert)
        made = min(entries, 2 * single) if is_sparse else entries
        matrices = (needs.matrices + needs.matrices_per_expert * len(read)) * entries * 8
        matrices += needs.squares * shape[-1:].numel() ** 2 * 8
        # The result in the file's form, and before it is put into it.
        result = min(2 * sum(read), 4 * entries) + 4 * made
        held = (_INDEX + _COPY * needs.copies) * single + _WRITTEN * made
        held += _COPY * sum(tiles.get(name, 0) for tiles in spread)
        chunk = (_SCRATCH + _VALUES * len(read)) * min(chunk_size(), entries)
        peak = int(matrices + result + held + chunk)
        weights.append(WeightEstimate(name, tuple(shape), method, len(read), sum(read), peak))
    return weights


def _spread_at_once(expert: StoredExpert) -> dict[str, int]:
    """Return how many entries of tiles an expert spreads at once, where a row of tiles exceeds the size of a chunk."""
    shapes = expert.shapes()
    kept = expert.kept_entries()
    spread: dict[str, int] = {}
    for name, (height, _) in expert.tiles().items():
        entries = shapes[name].numel()
        row = min(entries, height * shapes[name][1])
        if row > chunk_size():
            spread[name] = kept[name] * row // entries
    return spread


def largest(weights: Sequence[WeightEstimate]) -> WeightEstimate:
    return max(weights, key=lambda weight: weight.peak)


def check_memory(weights: Sequence[WeightEstimate], limit: int) -> None:
    """Refuse a merge that needs more bytes of memory than the limit, beyond what Python and torch take anyway."""
    most = largest(weights)
    if most.peak > limit:
        by_chunks = not (most.method.needs.matrices or most.method.needs.matrices_per_expert)
        other = "" if by_chunks else "take a method that works chunk by chunk (such as SparseAverage or TIES), "
        raise ValueError(
            f"merging {most.name} {most.shape} of {most.experts} experts with {type(most.method).__name__} needs about "
            f"{bytes_text(most.peak)} of memory, and max_memory is {bytes_text(limit)}; raise it, merge fewer experts, "
            f"{other}or keep the weight at the base with per_weight"
        )
