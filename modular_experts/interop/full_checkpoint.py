"""Compare a fine-tuned checkpoint with its base, weight by weight, and return the differences as deltas.

Names, shapes and dtypes are compared from the headers of the files first; then the files of both are read one weight at
a time, and neither model is loaded. The difference is taken in float32. An entry that equals the base's once that is
rounded to the checkpoint's narrower dtype did not move. Weights that are tied in the base are one weight here, under
the first of their names, and its delta moves both. A report tells what a lossy compression costs, and what rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from modular_experts.base import Base
from modular_experts.base.structure import Structure
from modular_experts.deltas import Delta, Dense
from modular_experts.interop.adapter import Compression, ImportedAdapter, Lossless
from modular_experts.progress import Progress
from modular_experts.text import did_you_mean

Vocabulary = Literal["error", "intersect"]


def read_full_checkpoint(
    checkpoint: str | Path | Base,
    base: str | Path | Base,
    compression: Compression | None = None,
    vocab: Vocabulary = "error",
    progress: Progress = iter,
) -> ImportedAdapter:
    """Compare a fine-tuned checkpoint with its base; an iteration over the deltas reads the numbers.

    Args:
        checkpoint: The fine-tuned model: configuration and safetensors weights, in one file or several.
        base: The model that it was made from.
        compression: How to store the difference of a weight; `Lossless` if not given.
        vocab: What to do with embeddings that have another number of rows: raise an error, or compare the rows in
            common.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The two are not two states of one model; the sentence names a weight that shows it.
    """
    compression = compression or Lossless()
    deltas = CheckpointDeltas(Base.open(checkpoint), Base.open(base), compression, vocab, progress)
    resized = {"vocab": vocab} if deltas.vocabularies else {}
    return ImportedAdapter(deltas, kind="checkpoint", settings=vars(compression) | resized)


class CheckpointDeltas(Iterable[tuple[str, Delta]]):
    """The deltas of the weights that moved; `read_full_checkpoint` explains the arguments.

    Attributes:
        report: What was kept and lost, by weight; each iteration fills it.
        vocabularies: Rows of each resized weight, `(in the checkpoint, in the base)`.
        tied: All names of each weight that is tied to another in the base.
        wider_dtypes: Data types of the checkpoint that are wider than the base's.
    """

    def __init__(
        self, tuned: Base, base: Base, compression: Compression, vocab: Vocabulary, progress: Progress
    ) -> None:
        self._tuned, self._base = tuned.weights, base.weights
        self._compression, self._progress = compression, progress
        self.report = ImportReport()
        self.wider_dtypes: set[str] = set()
        self.vocabularies: dict[str, tuple[int, int]] = {}
        ours, theirs = base.structure, tuned.structure
        self.tied = {name: twins for name in ours.weights if len(twins := ours.twins(name)) > 1}
        check_same_model(theirs, ours)
        unknown = [key for key in self._tuned.unclaimed() - self._base.unclaimed() if not theirs.is_unused(key)]
        if unknown:
            raise ValueError(
                f"the files of {theirs.place} hold {min(unknown)}, which is not a weight of {theirs.architecture}"
                f"{did_you_mean(min(unknown), theirs.shapes)}; save the checkpoint without it"
            )
        for name in ours.weights:
            here, there = self._base.shape(name), self._tuned.shape(name)
            if here == there:
                continue
            if name not in ours.vocabulary or here[1:] != there[1:]:
                raise ValueError(
                    f"{name} has shape {tuple(there)} in {theirs.place} and {tuple(here)} in {ours.place}, so it was "
                    "made from another base"
                )
            if vocab == "error":
                raise ValueError(
                    f"{name} has {there[0]} rows in {theirs.place} and {here[0]} in {ours.place}: its vocabulary was "
                    f"resized or padded; vocab: intersect takes the {min(here[0], there[0])} rows in common and leaves "
                    "the others as they are in the base"
                )
            self.vocabularies[name] = (there[0], here[0])

    def __iter__(self) -> Iterator[tuple[str, Delta]]:
        self.report, self.wider_dtypes = ImportReport(), set()
        for name in self._progress(self._base.structure.weights):
            delta = self._delta(name)
            if delta is not None:
                yield name, delta
        if not self.report.weights:
            raise ValueError(
                f"{self._tuned.structure.place} holds the same weights as {self._base.structure.place}, so there is "
                "nothing to import; is it the fine-tuned one?"
            )

    def _delta(self, name: str) -> Delta | None:
        """Return how far a weight moved, noted in the report, or None if it did not move."""
        base, tuned = self._base.read(name), self._tuned.read(name)
        # The checkpoint may store separately what is one tensor in the base.
        for twin in self.tied.get(name, []):
            if self._tuned.keys(twin) != self._tuned.keys(name) and not torch.equal(self._tuned.read(twin), tuned):
                raise ValueError(
                    f"{name} and {twin} are one tensor (tied) in {self._base.structure.place} and two different ones "
                    f"in {self._tuned.structure.place}, which no delta can express; import it against the base with "
                    "untied embeddings (load it with tie_word_embeddings=False, and save it)"
                )
        if torch.promote_types(base.dtype, tuned.dtype) != base.dtype:
            self.wider_dtypes.add(str(tuned.dtype).removeprefix("torch."))
        if name in self.vocabularies:
            rows = min(self.vocabularies[name])
            tuned = torch.cat([tuned[:rows], base[rows:].to(tuned.dtype)])
        wide = torch.promote_types(torch.promote_types(base.dtype, tuned.dtype), torch.float32)
        difference = tuned.to(wide, copy=True).sub_(base)
        if base.dtype != tuned.dtype:  # rounding to a narrower dtype is not a move
            difference.masked_fill_(base.to(tuned.dtype) == tuned, 0)
        difference = difference.float()
        if not difference.any():
            self.report.same += 1
            return None
        delta = self._compression.compress(difference)
        self.report.weights[name] = measure_loss(base, tuned, difference, delta)
        return delta

    def record(self) -> dict[str, Any]:
        """Return what a record notes about the import, after an iteration."""
        return {
            "account": self.report.record(),
            "vocabularies": self.vocabularies,
            "tied": {name: twins for name, twins in self.tied.items() if name in self.report.weights},
            "wider_dtypes": sorted(self.wider_dtypes),
        }


def check_same_model(one: Structure, other: Structure) -> None:
    """Check that two checkpoints are states of one model: the same architecture with the same weights.

    Raises:
        ValueError: They are not; the sentence names a weight that only one of them has.
    """
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


@dataclass(frozen=True)
class WeightReport:
    """What an import kept of one weight.

    Attributes:
        entries: Entries of the weight.
        moved: Entries that differ from the base.
        rounded: Entries that did not move but lost digits to the checkpoint's narrower dtype.
        energy: Squared Frobenius norm of the difference.
        lost: Squared Frobenius norm of the part of the difference that the delta lacks.
        missed: Entries where base plus delta, rounded to the checkpoint's dtype, is not the checkpoint's entry; 0
            for a lossy delta.
        farthest: Largest absolute difference among the missed entries.
    """

    entries: int
    moved: int
    rounded: int
    energy: float
    lost: float
    missed: int
    farthest: float

    @property
    def error(self) -> float:
        """Frobenius norm of the lost part, as a share of the norm of the difference."""
        return math.sqrt(self.lost / self.energy) if self.energy else 0.0


@dataclass
class ImportReport:
    """What an import kept of each weight that moved, and how many weights did not move (`same`)."""

    weights: dict[str, WeightReport] = field(default_factory=dict)
    same: int = 0

    def total(self) -> WeightReport:
        """Return the report of all weights together."""
        reports = list(self.weights.values())
        sums = {name: sum(getattr(report, name) for report in reports) for name in WeightReport.__annotations__}
        return WeightReport(**sums | {"farthest": max((report.farthest for report in reports), default=0.0)})

    def record(self) -> dict[str, Any]:
        """Return the totals for a record, with the relative error of each weight that lost something."""
        total = self.total()
        lossy = {name: report.error for name, report in sorted(self.weights.items()) if report.lost}
        shares = {"relative_error": total.error, "energy_kept": 1 - total.error**2}
        return {**asdict(total), "same_weights": self.same, **shares, "relative_errors": lossy}


def measure_loss(base: Tensor, tuned: Tensor, difference: Tensor, delta: Delta) -> WeightReport:
    """Compare a delta with the weights, as stored, of base and checkpoint, and with their difference in float32."""
    same = base.to(tuned.dtype) == tuned
    rounded = 0
    if base.dtype != tuned.dtype:
        common = torch.promote_types(base.dtype, tuned.dtype)
        rounded = int((same & (base.to(common) != tuned.to(common))).count_nonzero())
    lost = 0.0 if isinstance(delta, Dense) else _squared_norm((-delta).add_to(difference.clone()))
    missed, farthest = 0, 0.0
    if not lost:
        wide = base.to(torch.promote_types(base.dtype, torch.float32), copy=True)
        restored = delta.add_to(wide).to(tuned.dtype)
        wrong = restored != tuned
        gaps = restored[wrong].double() - tuned[wrong].double()
        missed, farthest = gaps.numel(), gaps.abs().max().item() if gaps.numel() else 0.0
    moved, energy = difference.numel() - int(same.count_nonzero()), _squared_norm(difference)
    return WeightReport(difference.numel(), moved, rounded, energy, lost, missed, farthest)


def _squared_norm(tensor: Tensor) -> float:
    # Sums run in float64 over slices, so that no second wide copy of a weight is made.
    wide = (chunk.double() for chunk in tensor.reshape(-1).split(2**22))
    return math.fsum(torch.dot(chunk, chunk).item() for chunk in wide)
