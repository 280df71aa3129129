"""Open the models that a recipe names, and read each weight as a tensor or as a delta from the base.

A model is a checkpoint, a checkpoint with a PEFT adapter on it, or an expert of ours on the recipe's base. Nothing is
merged on disk first: an adapter stays its two factors, and only one weight of each model is in memory. Differences of
weights on disk are taken a few rows at a time, so a merge holds neither all of them nor wide copies of whole weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from modular_experts.base import Base
from modular_experts.base.structure import Structure
from modular_experts.base.weights import StoredWeights
from modular_experts.deltas import Delta, Dense, Sparse, add
from modular_experts.deltas.tiles import index_dtype, true_places
from modular_experts.interop.full_checkpoint import check_same_model
from modular_experts.interop.mergekit.recipe import ModelReference, Recipe
from modular_experts.interop.peft import read_peft
from modular_experts.library import open_expert
from modular_experts.library.record import RECORD_FILE
from modular_experts.native.sparse_passes import unequal

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True, eq=False)
class Model:
    """A model of a recipe.

    Attributes:
        directory: The checkpoint.
        stored: Its weights.
        added: Deltas of an adapter or of an expert that are added to them, by weight.
    """

    directory: Path
    stored: StoredWeights
    added: Mapping[str, Delta]

    def tensor(self, weight: str) -> Tensor:
        """Return a weight, in float32 or wider."""
        stored = self.stored.read(weight)
        wide = stored.to(_wide(stored), copy=True)
        return self.added[weight].add_to(wide) if weight in self.added else wide

    def whole(self, weight: str, dtype: torch.dtype) -> Delta:
        """Return a weight as a delta from zero, for methods that merge models: in `dtype` if it is stored in it, else
        in float32 or wider.
        """
        if weight in self.added:
            return Dense(self.tensor(weight))
        stored = self.stored.read(weight)
        return WeightDifference(stored, None, dtype if dtype == stored.dtype else _wide(stored))

    def delta(self, weight: str, base: Model) -> Delta:
        """Return how far a weight is from the base's; what was added to the base keeps its form."""
        if self.directory == base.directory:
            terms = [self.added[weight]] if weight in self.added else []
            terms += [-base.added[weight]] if weight in base.added else []
            return add(terms) if terms else Sparse.zero(self.stored.shape(weight))
        if weight in self.added or weight in base.added:
            return Dense(self.tensor(weight) - base.tensor(weight))
        tuned, start = self.stored.read(weight), base.stored.read(weight)
        return weight_difference(tuned, start, torch.promote_types(_wide(tuned), start.dtype))

    def vocabulary(self) -> dict[str, int] | None:
        """Return the number of each token, or None if the model has no tokenizer."""
        from transformers import AutoTokenizer

        if not any((self.directory / name).is_file() for name in _TOKENIZER_FILES):
            return None
        return AutoTokenizer.from_pretrained(self.directory, trust_remote_code=False).get_vocab()


def _wide(stored: Tensor) -> torch.dtype:
    return torch.promote_types(stored.dtype, torch.float32)


def open_models(recipe: Recipe) -> dict[ModelReference, Model]:
    """Open the models of a recipe, each checkpoint once, and check that they can be merged.

    Raises:
        FileNotFoundError: A model, or one of its files, is missing.
        ValueError: Two models differ in their weights, in the shape of one, or in a tokenizer that the recipe asks for;
            an expert was trained on another base, or an adapter does not fit.
    """
    bases: dict[Path, Base] = {}
    structures: dict[bytes, Structure] = {}

    def open_base(reference: ModelReference) -> Base:
        directory = Base.open(reference.path, revision=reference.revision).directory.resolve()
        if directory not in bases:
            bases[directory] = opened = Base(reference.path, directory, reference.revision)
            # Checkpoints of one configuration share their structure, which takes a while to build.
            config = (directory / "config.json").read_bytes()
            if config in structures:
                opened.structure = Structure(structures[config].model, str(directory))
            structures.setdefault(config, opened.structure)
        return bases[directory]

    models: dict[ModelReference, Model] = {}
    base = recipe.base
    for reference in dict.fromkeys([base, *recipe.models] if base else recipe.models):
        added: Mapping[str, Delta] = {}
        if (Path(reference.path).expanduser() / RECORD_FILE).is_file():
            if base is None or reference.adapter is not None or base.adapter is not None or reference == base:
                raise ValueError(
                    f"{reference} is an expert, which moves a base and is not a model by itself; name the checkpoint "
                    "that it was trained on as base_model, and put no adapter on either"
                )
            added = expert = open_expert(reference.path)
            opened = Base.open(open_base(base), [expert])
        else:
            opened = open_base(reference)
        if reference.adapter is not None:
            added = dict(read_peft(reference.adapter.path, opened).deltas)
        models[reference] = Model(opened.directory, opened.weights, added)
    _check_alike(recipe, models)
    return models


def _check_alike(recipe: Recipe, models: Mapping[ModelReference, Model]) -> None:
    first, *others = [model.stored for model in models.values()]
    for other in others:
        check_same_model(first.structure, other.structure)
        if first.structure.weights != other.structure.weights:
            raise ValueError(f"only one of {first.structure.place} and {other.structure.place} ties its embeddings")
        for name in first.structure.weights:
            ours, theirs = tuple(first.shape(name)), tuple(other.shape(name))
            if ours != theirs:
                places = f"{ours} in {first.structure.place} and {theirs} in {other.structure.place}"
                raise ValueError(f"{name} has shape {places}; mergekit would cut or skip it, here both must be equal")
    if recipe.tokenizer and (base := recipe.base):
        expected = models[base].vocabulary()
        for reference, model in models.items():
            if expected is None or (model.vocabulary() or expected) != expected:
                raise ValueError(
                    f"the recipe asks for the tokenizer of {base}, which is missing, or {reference} has another one; "
                    "embeddings in another order are not supported"
                )


@dataclass(frozen=True, eq=False, repr=False)
class WeightDifference(Delta):
    """A delta of every entry that is computed on demand: `tuned - start`, or `tuned` alone.

    Args:
        tuned: A weight of any shape, as stored.
        start: The weight that it started from, of the same shape; None to take the weight as it is, for methods that
            merge models.
        wide: Data type of the delta, at least as wide as the tensors' own.
    """

    tuned: Tensor
    start: Tensor | None
    wide: torch.dtype

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.tuned.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.wide

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        return self.rows(0, self.shape[0] if self.shape else 1).view(self.shape)

    def dense(self) -> Tensor:
        return self.values

    def add_to(self, target: Tensor) -> Tensor:
        return Dense(self.values).add_to(target)

    def linear(self, x: Tensor) -> Tensor:
        return Dense(self.values).linear(x)

    @property
    def T(self) -> Dense:  # noqa: N802
        return Dense(self.values).T

    def __mul__(self, factor: float | Tensor) -> Dense:
        return Dense(self.values * factor)

    def rows(self, first: int, last: int) -> Tensor:
        tuned = self.tuned.view(1) if self.tuned.dim() == 0 else self.tuned
        rows = tuned[first:last].to(self.dtype)
        if self.start is None:
            return rows
        start = self.start.view_as(tuned)[first:last].to(self.dtype)
        # Without a cast, `rows` is a view of the mapped file, which must not be written to.
        return rows - start if tuned.dtype == self.dtype else rows.sub_(start)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Dense:
        return Dense(self.values.to(device=device, dtype=dtype))


def weight_difference(
    tuned: Tensor, start: Tensor, dtype: torch.dtype, sparse_up_to: float = 0.1, chunk: int = 2**18
) -> Delta:
    """Return `tuned - start` as single entries if few of them moved, as sparse experts leave a checkpoint, so that the
    cost of a merge follows their number; otherwise as a `WeightDifference`.

    `dtype` must be at least as wide as the tensors' own. Up to a share of `sparse_up_to` of the entries are held as
    single ones; `chunk` entries are compared at a time.
    """
    most, count = tuned.numel() * sparse_up_to, 0
    found: list[Tensor] = []
    for one, other in zip(*(each.reshape(-1).split(chunk) for each in (tuned, start)), strict=True):
        moved = torch.from_numpy(unequal(one, other)) if one.dtype == other.dtype else one != other
        found.append(true_places(moved) + len(found) * chunk)
        count += found[-1].numel()
        if count > most:
            return WeightDifference(tuned, start, dtype)
    places = torch.cat(found)
    ends, starts = (each.reshape(-1).index_select(0, places).to(dtype) for each in (tuned, start))
    return Sparse(places.to(index_dtype(tuned.shape)), ends - starts, tuned.shape)
