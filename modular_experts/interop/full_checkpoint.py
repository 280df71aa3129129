"""Full checkpoints: a fine-tuned model against its base, weight by weight, as deltas.

The files of both are read one weight at a time; neither model is ever loaded. Names, shapes and dtypes are compared
from the headers before that. The difference is taken in float32; an entry that is the base's, rounded to the
checkpoint's narrower dtype, did not move. Weights that are tied are one here, under the first of their names, and its
delta moves both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from modular_experts.base import Base
from modular_experts.base.weights import StoredWeights
from modular_experts.deltas import Delta
from modular_experts.interop.adapter import ForeignExpert
from modular_experts.interop.compression import Exact, Form
from modular_experts.interop.fidelity import Account, weigh
from modular_experts.progress import Progress
from modular_experts.text import did_you_mean

__all__ = ["CheckpointDeltas", "Vocabulary", "read_full_checkpoint"]

Vocabulary = Literal["error", "intersect"]


def read_full_checkpoint(
    directory: Path,
    base: Base,
    form: Form | None = None,
    vocab: Vocabulary = "error",
    progress: Progress = iter,
) -> ForeignExpert:
    """Compare a fine-tuned checkpoint with its base; numbers are read when the deltas are gone through.

    Args:
        directory: The fine-tuned model: configuration and safetensors weights, in one file or several.
        base: The model that it was made from.
        form: How the difference of a weight is stored; `Exact` if not given.
        vocab: What becomes of embeddings with another number of rows: an error, or a delta of the rows in common.
        progress: Wraps the names of the weights while they are gone through, for a progress bar.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The two are no two states of one model; the sentence says which weight shows it.
    """
    form = form or Exact()
    deltas = CheckpointDeltas(Base.open(directory).weights, base.weights, form, vocab, progress)
    resized = {"vocab": vocab} if deltas.vocabularies else {}
    return ForeignExpert(deltas=deltas, kind="checkpoint", settings=vars(form) | resized)


class CheckpointDeltas(Iterable[tuple[str, Delta]]):
    """The deltas of the weights that moved. Going through them fills `account`.

    Args:
        tuned: The fine-tuned checkpoint.
        base: Its base.
        form: How a difference is stored.
        vocab: As for `read_full_checkpoint`.
        progress: As for `read_full_checkpoint`.

    Attributes:
        account: What was kept and lost, by weight.
        vocabularies: Rows of each resized weight, `(in the checkpoint, in the base)`.
        tied: All names of each weight that is tied to another in the base.
        dtypes: Data types in which the checkpoint stores a weight that are wider than the base's.
    """

    def __init__(
        self, tuned: StoredWeights, base: StoredWeights, form: Form, vocab: Vocabulary, progress: Progress
    ) -> None:
        self._tuned, self._base, self._form, self._progress = tuned, base, form, progress
        self.account = Account()
        self.dtypes: set[str] = set()
        names = base.structure.weights
        self.tied = {name: twins for name in names if len(twins := base.structure.twins(name)) > 1}
        self._check_model()
        self.vocabularies = self._check_shapes(vocab)

    def __iter__(self) -> Iterator[tuple[str, Delta]]:
        self.account, self.dtypes = Account(), set()
        for name in self._progress(self._base.structure.weights):
            delta = self._delta(name)
            if delta is not None:
                yield name, delta
        if not self.account.weights:
            raise ValueError(
                f"{self._tuned.structure.place} holds the same weights as {self._base.structure.place}, so there is "
                "nothing to import; is it the fine-tuned one?"
            )

    def _delta(self, name: str) -> Delta | None:
        base, tuned = self._base.read(name), self._read_tuned(name)
        if torch.promote_types(base.dtype, tuned.dtype) != base.dtype:
            self.dtypes.add(str(tuned.dtype).removeprefix("torch."))
        if name in self.vocabularies:
            rows = min(self.vocabularies[name])
            tuned = torch.cat([tuned[:rows], base[rows:].to(tuned.dtype)])
        difference = _difference(base, tuned)
        if not difference.any():
            self.account.same += 1
            return None
        delta = self._form.of(difference)
        self.account.weights[name] = weigh(base, tuned, difference, delta)
        return delta

    def _read_tuned(self, name: str) -> Tensor:
        """Read a weight of the checkpoint, which may store apart what is one tensor in the base."""
        tensor = self._tuned.read(name)
        for twin in self.tied.get(name, []):
            if self._tuned.keys(twin) != self._tuned.keys(name) and not torch.equal(self._tuned.read(twin), tensor):
                raise ValueError(
                    f"{name} and {twin} are one tensor (tied) in {self._base.structure.place} and two different ones "
                    f"in {self._tuned.structure.place}, which no delta can express; import it against the base with "
                    "untied embeddings (load it with tie_word_embeddings=False, and save it)"
                )
        return tensor

    def origin(self) -> dict[str, Any]:
        """Return what a record should say, once the deltas have been gone through."""
        moved = self.account.weights
        return {
            "account": self.account.record(),
            "vocabularies": self.vocabularies,
            "tied": {name: twins for name, twins in self.tied.items() if name in moved},
            "wider_dtypes": sorted(self.dtypes),
        }

    def _check_model(self) -> None:
        """Refuse a checkpoint of another architecture, or with weights that the base lacks."""
        ours, theirs = self._base.structure, self._tuned.structure
        if ours.architecture != theirs.architecture:
            raise ValueError(
                f"{theirs.place} is a {theirs.architecture} and {ours.place} a {ours.architecture}; a delta is between "
                "two states of one model, so give the base that this checkpoint was made from"
            )
        for one, other in ((theirs, ours), (ours, theirs)):
            alone = [name for name in one.shapes if name not in other.shapes]
            if alone:
                more = f" and {len(alone) - 1} more" if len(alone) > 1 else ""
                raise ValueError(
                    f"{one.place} has {alone[0]}{more}, and {other.place} has not; they are models of different make "
                    "(number of layers, biases), so is it the right base?"
                )
        unknown = [key for key in self._tuned.unclaimed() - self._base.unclaimed() if not theirs.is_unused(key)]
        if unknown:
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise ValueError(
                f"the files of {theirs.place} hold {min(unknown)}{more}, which is no weight of {theirs.architecture}; "
                f"save the checkpoint without what is not part of the model{did_you_mean(min(unknown), theirs.shapes)}"
            )

    def _check_shapes(self, vocab: Vocabulary) -> dict[str, tuple[int, int]]:
        """Compare the shapes; return the rows of the weights whose vocabulary has another size."""
        resized = {}
        for name in self._base.structure.weights:
            ours, theirs = self._base.shape(name), self._tuned.shape(name)
            if ours == theirs:
                continue
            if name not in self._base.structure.vocabulary or ours[1:] != theirs[1:]:
                raise ValueError(
                    f"{name} has shape {tuple(theirs)} in {self._tuned.structure.place} and {tuple(ours)} in "
                    f"{self._base.structure.place}, so it was made from another base"
                )
            if vocab == "error":
                raise ValueError(
                    f"{name} has {theirs[0]} rows in {self._tuned.structure.place} and {ours[0]} in "
                    f"{self._base.structure.place}: its vocabulary was resized or padded; vocab: intersect takes the "
                    f"{min(ours[0], theirs[0])} rows in common and leaves the others as they are in the base"
                )
            resized[name] = (theirs[0], ours[0])
        return resized


def _difference(base: Tensor, tuned: Tensor) -> Tensor:
    """Return in float32 how far each entry moved; see the module's docstring for narrower dtypes."""
    wide = torch.promote_types(torch.promote_types(base.dtype, tuned.dtype), torch.float32)
    difference = tuned.to(wide, copy=True).sub_(base)
    if base.dtype != tuned.dtype:
        difference.masked_fill_(base.to(tuned.dtype) == tuned, 0)
    return difference.float()
