"""Inputs: the models that a recipe names, each as the tensors of its weights or as its deltas from the base.

A model is a checkpoint, a checkpoint with a PEFT adapter on it, or an expert of ours on the recipe's base. Nothing is
merged on disk first: an adapter stays the two factors that it is, and only one weight of each model is in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from modular_experts.base.checkpoint import fingerprint, resolve_base
from modular_experts.base.structure import Skeleton, read_skeleton
from modular_experts.base.weights import StoredWeights
from modular_experts.deltas import Delta, Dense, Sparse, add
from modular_experts.interop.mergekit.configuration import Configuration
from modular_experts.interop.mergekit.moved import Moved
from modular_experts.interop.mergekit.references import ModelPath, Reference
from modular_experts.interop.peft import read_peft
from modular_experts.library import check_base, open_expert

__all__ = ["Model", "open_models"]


class Model:
    """A model of a recipe.

    Args:
        name: How the recipe calls it.
        directory: The checkpoint.
        stored: Its weights.
        added: What is added to them, by weight: the deltas of an adapter or of an expert.
    """

    def __init__(self, name: str, directory: Path, stored: StoredWeights, added: Mapping[str, Delta]) -> None:
        self.name, self.directory, self.stored, self._added = name, directory, stored, added

    def tensor(self, weight: str) -> Tensor:
        """Return a weight, in float32 or wider."""
        stored = self.stored.read(weight)
        wide = stored.to(_wide(stored), copy=True)
        return self._added[weight].add_to(wide) if weight in self._added else wide

    def whole(self, weight: str, dtype: torch.dtype) -> Delta:
        """Return a weight as a delta from nothing, for methods that merge models; in `dtype` if it is stored so."""
        stored = self.stored.read(weight)
        if weight in self._added:
            return Dense(self.tensor(weight))
        return Moved(stored, None, dtype if dtype == stored.dtype else _wide(stored))

    def delta(self, weight: str, base: Model) -> Delta:
        """Return how far a weight is from the base's, in the form that what was added to the base has.

        Args:
            weight: The weight.
            base: The base.
        """
        if self.directory != base.directory:
            if weight in self._added or weight in base._added:
                return Dense(self.tensor(weight) - base.tensor(weight))
            tuned, start = self.stored.read(weight), base.stored.read(weight)
            return Moved(tuned, start, torch.promote_types(_wide(tuned), start.dtype)).packed()
        terms = [self._added[weight]] if weight in self._added else []
        terms += [-base._added[weight]] if weight in base._added else []
        return add(terms) if terms else Sparse.zero(self.stored.shape(weight))


def _wide(stored: Tensor) -> torch.dtype:
    return torch.promote_types(stored.dtype, torch.float32)


def open_models(recipe: Configuration) -> dict[Reference, Model]:
    """Open the models of a recipe and see that they are models of one make.

    Raises:
        FileNotFoundError: A model or a file of it is missing.
        ValueError: Two of them differ in their weights or in the shape of one, an expert is one of another base, or an
            adapter does not fit.
    """
    opened = _Opener()
    named = dict.fromkeys([recipe.base, *recipe.models] if recipe.base else recipe.models)
    found = {model: opened.model(model, recipe.base) for model in named if model is not None}
    first, *others = found.values()
    for other in others:
        _check_same_make(first, other)
    return found


class _Opener:
    """Opens each checkpoint once."""

    def __init__(self) -> None:
        self._checkpoints: dict[Path, StoredWeights] = {}
        self._skeletons: dict[bytes, Skeleton] = {}

    def model(self, reference: Reference, base: Reference | None) -> Model:
        if (Path(reference.model.path).expanduser() / "expert.json").is_file():
            return self._expert(reference, base)
        directory = _directory(reference.model)
        stored = self._stored(directory)
        added = {} if reference.adapter is None else _adapter(reference.adapter, directory, stored)
        return Model(str(reference), directory, stored, added)

    def _expert(self, reference: Reference, base: Reference | None) -> Model:
        if base is None or reference.adapter is not None or base.adapter is not None or reference == base:
            raise ValueError(
                f"{reference} is an expert, which moves a base and is no model by itself; name the checkpoint that it "
                "was trained on as base_model, and put no adapter on either"
            )
        expert, directory = open_expert(reference.model.path), _directory(base.model)
        check_base([expert], fingerprint(directory), str(base))
        return Model(str(reference), directory, self._stored(directory), expert)

    def _stored(self, directory: Path) -> StoredWeights:
        if directory not in self._checkpoints:
            self._checkpoints[directory] = StoredWeights(directory, self._skeleton(directory))
        return self._checkpoints[directory]

    def _skeleton(self, directory: Path) -> Skeleton:
        config = (directory / "config.json").read_bytes()
        if config not in self._skeletons:
            self._skeletons[config] = read_skeleton(directory)
        return replace(self._skeletons[config], place=str(directory))


def _directory(path: ModelPath) -> Path:
    return resolve_base(path.path, path.revision).resolve()


def _adapter(path: ModelPath, directory: Path, stored: StoredWeights) -> dict[str, Delta]:
    """Read an adapter's deltas, which are small enough to be held together."""
    place = Path(path.path).expanduser()
    if path.revision is not None or not place.is_dir():
        raise FileNotFoundError(f"the adapter {path} is no directory here; fetch it, and give the directory")
    deltas = dict(read_peft(place, directory).deltas)
    for name, delta in deltas.items():
        stored.skeleton.check(name, delta.shape, str(path))
        if stored.skeleton.owners[name] != name or len(stored.skeleton.twins(name)) > 1:
            raise ValueError(f"{path} moves {name}, which is tied to another weight in {stored.skeleton.place}")
    return deltas


def _check_same_make(first: Model, other: Model) -> None:
    ours, theirs = first.stored.skeleton, other.stored.skeleton
    if ours.model != theirs.model:
        raise ValueError(f"{first.name} is a {ours.model} and {other.name} a {theirs.model}, which cannot be merged")
    for one, two in ((first, other), (other, first)):
        alone = _missing(one.stored.skeleton.weights(), two.stored.skeleton.weights())
        if alone:
            raise ValueError(
                f"{one.name} has the weight {alone[0]} and {two.name} has not; only models of one make can be merged "
                "(number of layers, biases, tied embeddings)"
            )
    for name in ours.weights():
        if first.stored.shape(name) != other.stored.shape(name):
            raise ValueError(
                f"{name} has shape {tuple(first.stored.shape(name))} in {first.name} and "
                f"{tuple(other.stored.shape(name))} in {other.name}; mergekit would cut or skip it, here models of one "
                "shape are merged"
            )


def _missing(names: Sequence[str], others: Sequence[str]) -> list[str]:
    known = set(others)
    return [name for name in names if name not in known]
