"""Open the models that a recipe names, and read each weight as a tensor or as a delta from the base.

A model is a checkpoint, a checkpoint with a PEFT adapter on it, or an expert of ours on the recipe's base. Nothing is
merged on disk first: an adapter stays its two factors, and only one weight of each model is in memory.
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
from modular_experts.interop.mergekit.difference import WeightDifference, weight_difference
from modular_experts.interop.mergekit.recipe import ModelReference, Recipe
from modular_experts.interop.peft import read_peft
from modular_experts.library import open_expert

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True, eq=False)
class Model:
    """A model of a recipe.

    Attributes:
        name: The recipe's name of the model.
        directory: The checkpoint.
        stored: Its weights.
        added: Deltas of an adapter or of an expert that are added to them, by weight.
    """

    name: str
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
        FileNotFoundError: A model or one of its files is missing, or the recipe asks for a tokenizer that the base does
            not have.
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
        if (Path(reference.path).expanduser() / "expert.json").is_file():
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
            added = _adapter(reference.adapter, opened)
        models[reference] = Model(str(reference), opened.directory, opened.weights, added)

    first, *others = models.values()
    for other in others:
        _check_same_weights(first, other)
    if recipe.tokenizer and base:
        expected = models[base].vocabulary()
        if expected is None:
            raise FileNotFoundError(
                f"the recipe asks for the tokenizer of {base}, and {models[base].directory} has none"
            )
        for model in models.values():
            if (model.vocabulary() or expected) != expected:
                raise ValueError(
                    f"the tokenizer of {model.name} is not that of {base}, and its embeddings would have to be put in "
                    "another order, which is not supported"
                )
    return models


def _adapter(adapter: ModelReference, base: Base) -> dict[str, Delta]:
    """Read an adapter's deltas, which are small enough to be held together."""
    place, structure = Path(adapter.path).expanduser(), base.structure
    if adapter.revision is not None or not place.is_dir():
        raise FileNotFoundError(f"the adapter {adapter} is not a directory here; fetch it, and give the directory")
    deltas = dict(read_peft(place, base).deltas)
    for name, delta in deltas.items():
        structure.check(name, delta.shape, str(adapter))
        if structure.owners[name] != name or len(structure.twins(name)) > 1:
            raise ValueError(f"{adapter} moves {name}, which is tied to another weight in {structure.place}")
    return deltas


def _check_same_weights(first: Model, other: Model) -> None:
    ours, theirs = first.stored.structure, other.stored.structure
    if ours.architecture != theirs.architecture:
        raise ValueError(
            f"{first.name} is a {ours.architecture} and {other.name} a {theirs.architecture}, which cannot be merged"
        )
    for one, two in ((first, other), (other, first)):
        known = set(two.stored.structure.weights)
        alone = next((name for name in one.stored.structure.weights if name not in known), None)
        if alone:
            raise ValueError(
                f"{one.name} has the weight {alone} and {two.name} has not; only models with the same weights can be "
                "merged (number of layers, biases, tied embeddings)"
            )
    for name in ours.weights:
        if first.stored.shape(name) != other.stored.shape(name):
            raise ValueError(
                f"{name} has shape {tuple(first.stored.shape(name))} in {first.name} and "
                f"{tuple(other.stored.shape(name))} in {other.name}; mergekit would cut or skip it, here the shapes "
                "must be equal"
            )
