"""Estimate what a merge will read and hold in memory, from the tables of the experts' files and methods' `needs`."""

from collections.abc import Sequence
from dataclasses import dataclass

from modular_experts.library import StoredExpert
from modular_experts.merging.merged import Merged
from modular_experts.methods import MergeMethod
from modular_experts.methods.chunks import chunk_size
from modular_experts.text import bytes_text

# Bytes per entry of a chunk (a few tensors of eight bytes; the pruned values of each expert), per single entry that an
# expert keeps (its decoded index; a copy of index and value), and per entry of the weight (writing the result).
_SCRATCH, _VALUES, _INDEX, _COPY, _WRITTEN = 40, 8, 4, 8, 6


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


def estimate(merged: Merged) -> list[WeightEstimate]:
    sizes = [expert.stored_bytes() for expert in merged.stored]
    tables = [(expert.forms(), expert.kept_entries()) for expert in merged.stored]
    spread = [_spread_at_once(expert) for expert in merged.stored]
    found = []
    for name, shape in merged.shapes().items():
        method, entries = merged.rules[name], shape.numel()
        read = [stored[name] for stored in sizes if name in stored]
        kept = [counts[name] for forms, counts in tables if forms.get(name) == "Sparse"]  # tiles have few indices
        single, needs = sum(kept), method.needs
        # A method that goes chunk by chunk makes single entries of single entries, each with its index.
        is_sparse = len(kept) == len(read) and not (needs.matrices or needs.matrices_per_expert)
        made = min(entries, 2 * single) if is_sparse else entries
        matrices = (needs.matrices + needs.matrices_per_expert * len(read)) * entries * 8
        matrices += needs.squares * shape[-1:].numel() ** 2 * 8
        result = min(2 * sum(read), 4 * entries) + 4 * made  # in the file's form, and before it is put into it
        held = (_INDEX + _COPY * needs.copies) * single + _WRITTEN * made
        held += _COPY * sum(tiles.get(name, 0) for tiles in spread)
        peak = int(matrices + result + held + (_SCRATCH + _VALUES * len(read)) * min(chunk_size(), entries))
        found.append(WeightEstimate(name, tuple(shape), method, len(read), sum(read), peak))
    return found


def _spread_at_once(expert: StoredExpert) -> dict[str, int]:
    """Return how many entries of tiles an expert spreads at once, where a row of tiles exceeds the size of a chunk."""
    shapes, kept, found = expert.shapes(), expert.kept_entries(), {}
    for name, (height, _) in expert.tiles().items():
        entries = shapes[name].numel()
        rows = min(entries, height * shapes[name][1])
        if rows > chunk_size():
            found[name] = kept[name] * rows // entries
    return found


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
