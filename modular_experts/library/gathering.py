"""Gathering: the statistics of all experts of a merge, weight by weight, once they are known to belong together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from modular_experts.library.expert import StoredExpert
from modular_experts.library.statistics import StoredStatistics, command_for, has_statistics, open_statistics
from modular_experts.merging.statistic import Statistic

__all__ = ["Gathered", "gather_statistics"]


class Gathered:
    """The statistics of one kind of the experts of a merge: called with a weight's name, it gives one per expert.

    Those of the weight before are let go of, so that one weight of every expert is in memory at a time.
    """

    def __init__(self, opened: Sequence[StoredStatistics]) -> None:
        self._opened = opened
        self._name: str | None = None

    @property
    def content_hashes(self) -> list[str]:
        """The content hash of each file."""
        return [found.content_hash for found in self._opened]

    def __call__(self, name: str) -> list[Statistic | None]:
        if self._name not in (None, name):
            for found in self._opened:
                found.release(str(self._name))
        self._name = name
        return [found[name] for found in self._opened]


def gather_statistics(
    experts: Sequence[StoredExpert], kind: str | None, shapes: Mapping[str, Sequence[int]]
) -> Gathered:
    """Return what gives the statistics of a weight, one per expert; it gives none at all if no kind is asked for.

    Args:
        experts: The experts that are merged.
        kind: The kind that the merge method needs.
        shapes: The weights that are merged, with their shapes.

    Raises:
        ValueError: An expert has none of this kind, or they are not for these weights, or hold for other experts. The
            sentence names the command that makes them.
    """
    if kind is None:
        return Gathered([])
    lacking = [expert for expert in experts if not has_statistics(expert, kind)]
    if lacking:
        raise ValueError(
            f"{lacking[0].path} has no {kind} statistics, which this method needs; take them for all experts of the "
            f"merge: {command_for(experts, kind, overwrite=len(lacking) < len(experts))}"
        )
    opened = [open_statistics(expert, kind) for expert in experts]
    hashes = {expert.content_hash for expert in experts}
    for expert, found in zip(experts, opened, strict=True):
        problem = _misfit(found, shapes, hashes)
        if problem:
            raise ValueError(
                f"the {kind} statistics of {expert.path} {problem}; take them for all experts of the merge: "
                f"{command_for(experts, kind, overwrite=True)}"
            )
    return Gathered(opened)


def _misfit(found: StoredStatistics, shapes: Mapping[str, Sequence[int]], hashes: set[str]) -> str | None:
    missing = [name for name in shapes if name not in found]
    if missing:
        more = f" and {len(missing) - 1} more weights" if len(missing) > 1 else ""
        return f"do not cover {missing[0]}{more}, which another expert moves"
    unfit = [name for name, shape in shapes.items() if not found.fits(name, shape)]
    if unfit:
        return f"have the wrong shape for {unfit[0]}"
    among = set(found.facts["among"])
    return "were taken in a merge of other experts" if among and among != hashes else None
