"""Compare a fine-tuned checkpoint with its base, weight by weight, and hold what another tool trained as deltas."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from modular_experts.base import Base
from modular_experts.base.structure import Structure
from modular_experts.deltas import Delta, Dense, Sparse
from modular_experts.deltas.tiles import index_dtype
from modular_experts.library.record import Facts, Record
from modular_experts.progress import Progress
from modular_experts.text import did_you_mean


@dataclass(frozen=True)
class ImportedAdapter:
    """The deltas of another tool's fine-tuning by the names of weights in the loaded base, and facts of its files.

    An iteration over the deltas can be repeated. `head` has weight and bias of a classifier's last layer.
    """

    deltas: Iterable[tuple[str, Delta]]
    kind: str
    settings: Facts = field(default_factory=dict)
    head: Mapping[str, Tensor] = field(default_factory=dict)


def read_full_checkpoint(
    checkpoint: str | Path | Base, base: str | Path | Base, progress: Progress = iter
) -> ImportedAdapter:
    """Compare a fine-tuned checkpoint with its base; an iteration over the deltas reads the numbers."""
    return ImportedAdapter(CheckpointDeltas(Base.open(checkpoint), Base.open(base), progress), kind="checkpoint")


class WeightReport(NamedTuple):
    """Entries of a weight, how many moved, how many base plus delta misses by rounding, and by how much at most."""

    entries: int
    moved: int
    missed: int
    farthest: float


class CheckpointDeltas(Iterable[tuple[str, Delta]]):
    """The deltas of the weights that moved; each iteration fills the `report` of them, and counts the others (`same`).

    `tied` has all names of each weight that is tied in the base.
    """

    def __init__(self, tuned: Base, base: Base, progress: Progress) -> None:
        self._tuned = tuned.weights
        self._base = base.weights
        self._progress = progress
        self.report = dict[str, WeightReport]()
        self.same = 0
        ours = base.structure
        theirs = tuned.structure
        names = {name: ours.twins(name) for name in ours.weights}
        self.tied = {name: twins for name, twins in names.items() if len(twins) > 1}
        check_same_model(theirs, ours)
        unknown = [key for key in self._tuned.unclaimed() - self._base.unclaimed() if not theirs.is_unused(key)]
        if unknown:
            raise ValueError(
                f"the files of {theirs.place} hold {min(unknown)}, which is not a weight of {theirs.architecture}"
                f"{did_you_mean(min(unknown), theirs.shapes)}; save the checkpoint without it"
            )
        for name in ours.weights:
            here = tuple(self._base.shape(name))
            there = tuple(self._tuned.shape(name))
            if here != there:
                why = "so it was made from another base"
                if name in ours.vocabulary and here[1:] == there[1:]:
                    why = "so its vocabulary was resized or padded; give its embeddings the base's number of rows"
                raise ValueError(f"{name} has shape {there} in {theirs.place} and {here} in {ours.place}, {why}")

    def __iter__(self) -> Iterator[tuple[str, Delta]]:
        self.report = {}
        self.same = 0
        for name in self._progress(self._base.structure.weights):
            delta = self._delta(name)
            if delta is not None:
                yield name, delta
        if not self.report:
            raise ValueError(
                f"{self._tuned.structure.place} holds the same weights as {self._base.structure.place}, so there is "
                "nothing to import; is it the fine-tuned one?"
            )

    def _delta(self, name: str) -> Delta | None:
        base = self._base.read(name)
        tuned = self._tuned.read(name)
        # The checkpoint may store separately what is one tensor in the base.
        for twin in self.tied.get(name, []):
            if self._tuned.keys(twin) != self._tuned.keys(name) and not torch.equal(self._tuned.read(twin), tuned):
                raise ValueError(
                    f"{name} and {twin} are one tensor (tied) in {self._base.structure.place} and two different ones "
                    f"in {self._tuned.structure.place}, which no delta can express; import it against an untied "
                    f"copy of the base, in Python Base.open({self._base.structure.place!r}).untie('untied')"
                )
        wide = torch.promote_types(torch.promote_types(base.dtype, tuned.dtype), torch.float32)
        difference = tuned.to(wide, copy=True).sub_(base)
        if base.dtype != tuned.dtype:  # rounding to a narrower dtype is not a move
            difference.masked_fill_(base.to(tuned.dtype) == tuned, 0)
        difference = difference.float()
        if not difference.any():
            self.same += 1
            return None
        delta = lossless(difference)
        restored = delta.add_to(base.to(torch.promote_types(base.dtype, torch.float32), copy=True)).to(tuned.dtype)
        wrong = restored != tuned
        gaps = (restored[wrong].double() - tuned[wrong].double()).abs()
        moved = int((base.to(tuned.dtype) != tuned).count_nonzero())
        farthest = gaps.max().item() if gaps.numel() else 0.0
        self.report[name] = WeightReport(difference.numel(), moved, gaps.numel(), farthest)
        return delta

    def record(self) -> Record:
        reports = list(self.report.values())
        sums = {name: sum(getattr(report, name) for report in reports) for name in ("entries", "moved", "missed")}
        account = {
            **sums,
            "farthest": max((report.farthest for report in reports), default=0.0),
            "same_weights": self.same,
        }
        return {"account": account, "tied": {name: twins for name, twins in self.tied.items() if name in self.report}}


def check_same_model(one: Structure, other: Structure) -> None:
    """Raise ValueError if two checkpoints are not states of one model: the same architecture with the same weights."""
    if one.architecture != other.architecture:
        names = f"{one.place} is a {one.architecture} and {other.place} a {other.architecture}"
        raise ValueError(f"{names}; they are not two states of one model")
    for here, there in ((one, other), (other, one)):
        alone = [name for name in here.shapes if name not in there.shapes]
        if alone:
            more = f" and {len(alone) - 1} more" if len(alone) > 1 else ""
            raise ValueError(
                f"{here.place} has {alone[0]}{more}, and {there.place} does not; the two differ in their number of "
                "layers or in their biases, so they are not two states of one model"
            )


def lossless(difference: Tensor) -> Delta:
    """Return the difference of a weight as `Sparse` where that takes fewer bytes, else as `Dense`."""
    moved = int(difference.count_nonzero())
    index = index_dtype(difference.shape)
    if moved * (4 + index.itemsize) >= 4 * difference.numel():
        return Dense(difference)
    flat = difference.reshape(-1)  # PEFT states some deltas transposed
    indices = flat.nonzero()[:, 0]
    return Sparse(indices.to(index), flat[indices], difference.shape)
