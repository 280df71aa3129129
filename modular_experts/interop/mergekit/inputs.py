"""Inputs: the models that a recipe names, each as the tensors of its weights or as its deltas from the base.

A model is a checkpoint, a checkpoint with a PEFT adapter on it, or an expert of ours on the recipe's base. Nothing is
merged on disk first: an adapter stays the two factors that it is, and only one weight of each model is in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from modular_experts.base import Base
from modular_experts.base.structure import Structure
from modular_experts.base.weights import StoredWeights
from modular_experts.deltas import Delta, Dense, Sparse, add
from modular_experts.interop.mergekit.configuration import Configuration
from modular_experts.interop.mergekit.moved import Moved
from modular_experts.interop.mergekit.references import ModelPath, Reference
from modular_experts.interop.peft import read_peft
from modular_experts.library import open_expert

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
        self._bases: dict[Path, Base] = {}
        self._structures: dict[bytes, Structure] = {}

    def model(self, reference: Reference, base: Reference | None) -> Model:
        if (Path(reference.model.path).expanduser() / "expert.json").is_file():
            return self._expert(reference, base)
        opened = self._base(reference.model)
        directory, stored = opened.directory, opened.weights
        added = {} if reference.adapter is None else _adapter(reference.adapter, opened)
        return Model(str(reference), directory, stored, added)

    def _expert(self, reference: Reference, base: Reference | None) -> Model:
        if base is None or reference.adapter is not None or base.adapter is not None or reference == base:
            raise ValueError(
                f"{reference} is an expert, which moves a base and is no model by itself; name the checkpoint that it "
                "was trained on as base_model, and put no adapter on either"
            )
        expert, opened = open_expert(reference.model.path), self._base(base.model)
        Base.open(opened, [expert])
        return Model(str(reference), opened.directory, opened.weights, expert)

    def _base(self, path: ModelPath) -> Base:
        """Return a checkpoint; those of one configuration share the structure, which takes a while to build."""
        opened = Base.open(path.path, revision=path.revision)
        directory = opened.directory.resolve()
        if directory not in self._bases:
            opened, config = Base(path.path, directory, path.revision), (directory / "config.json").read_bytes()
            if config in self._structures:
                opened.structure = Structure(self._structures[config].model, str(directory))
            self._structures.setdefault(config, opened.structure)
            self._bases[directory] = opened
        return self._bases[directory]


def _adapter(path: ModelPath, base: Base) -> dict[str, Delta]:
    """Read an adapter's deltas, which are small enough to be held together."""
    place = Path(path.path).expanduser()
    if path.revision is not None or not place.is_dir():
        raise FileNotFoundError(f"the adapter {path} is no directory here; fetch it, and give the directory")
    deltas, structure = dict(read_peft(place, base).deltas), base.structure
    for name, delta in deltas.items():
        structure.check(name, delta.shape, str(path))
        if structure.owners[name] != name or len(structure.twins(name)) > 1:
            raise ValueError(f"{path} moves {name}, which is tied to another weight in {structure.place}")
    return deltas


def _check_same_make(first: Model, other: Model) -> None:
    ours, theirs = first.stored.structure, other.stored.structure
    if ours.architecture != theirs.architecture:
        raise ValueError(
            f"{first.name} is a {ours.architecture} and {other.name} a {theirs.architecture}, which cannot be merged"
        )
    for one, two in ((first, other), (other, first)):
        alone = _missing(one.stored.structure.weights, two.stored.structure.weights)
        if alone:
            raise ValueError(
                f"{one.name} has the weight {alone[0]} and {two.name} has not; only models of one make can be merged "
                "(number of layers, biases, tied embeddings)"
            )
    for name in ours.weights:
        if first.stored.shape(name) != other.stored.shape(name):
            raise ValueError(
                f"{name} has shape {tuple(first.stored.shape(name))} in {first.name} and "
                f"{tuple(other.stored.shape(name))} in {other.name}; mergekit would cut or skip it, here models of one "
                "shape are merged"
            )


def _missing(names: Sequence[str], others: Sequence[str]) -> list[str]:
    known = set(others)
    return [name for name in names if name not in known]
