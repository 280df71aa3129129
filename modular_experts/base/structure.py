"""Describe a model's weights and layers: names, shapes, which names share one tensor, how a layer keeps its weight."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import nn

from modular_experts.text import did_you_mean

_UNUSED = (r"(^|\.)rotary_emb\.inv_freq$", r"(^|\.)attn\.(masked_)?bias$", r"(^|\.)attention\.(masked_)?bias$")


class Structure:
    """What a model is made of, without its numbers.

    Attributes:
        model: The model, on any device; a causal language model for `vocabulary`, `name_of` and `is_unused`.
        place: What an error's sentence calls it; the name of its class if not given.
    """

    def __init__(self, model: nn.Module, place: str | None = None) -> None:
        self.model: Any = model
        self.place = place or type(model).__name__

    @property
    def architecture(self) -> str:
        return type(self.model).__name__

    @cached_property
    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters(remove_duplicate=False))

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Shape of each weight by each of its names; a tied tensor has several names."""
        return {name: weight.shape for name, weight in self._parameters.items()}

    @cached_property
    def owners(self) -> dict[str, str]:
        """For each name the first name of its tensor, under which a delta of it is stored."""
        first: dict[int, str] = {}
        return {name: first.setdefault(id(weight), name) for name, weight in self._parameters.items()}

    @cached_property
    def weights(self) -> list[str]:
        """The first name of each weight, sorted."""
        return sorted(set(self.owners.values()))

    def twins(self, name: str) -> list[str]:
        """Return all names of a weight's tensor: more than one if it is tied."""
        return [other for other, owner in self.owners.items() if owner == self.owners[name]]

    @cached_property
    def vocabulary(self) -> frozenset[str]:
        """First names of the weights with a row for each token: embeddings, the head and its bias."""
        layers = [self.model.get_input_embeddings(), self.model.get_output_embeddings()]
        theirs = {id(weight) for layer in layers if layer is not None for weight in layer.parameters()}
        return frozenset(self.owners[name] for name, weight in self._parameters.items() if id(weight) in theirs)

    def layer(self, weight: str) -> nn.Module:
        return self.model.get_submodule(weight.rpartition(".")[0])

    def name_of(self, key: str) -> str | None:
        """Return the model's name of a stored tensor, or None if the tensor is not one of its weights.

        Tensors that transformers cuts or joins while it loads, such as the experts of a mixture, have no such name.
        """
        if key in self.shapes:
            return key
        from transformers.core_model_loading import rename_source_key

        name, _ = rename_source_key(key, self._renamings, [], self.model.base_model_prefix, self.shapes)
        return name if name in self.shapes else None

    @cached_property
    def _renamings(self) -> list[Any]:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        return [way for way in get_model_conversion_mapping(self.model) if isinstance(way, WeightRenaming)]

    def is_unused(self, key: str) -> bool:
        """Return whether files may hold this tensor although the model ignores it, such as a mask of older versions."""
        patterns = (*_UNUSED, *(getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ()))
        return any(re.search(pattern, key) for pattern in patterns)

    def check(self, name: str, shape: torch.Size, source: str = "the expert") -> None:
        """Raise ValueError, which names the source, if the model lacks a weight or has it in another shape."""
        if name not in self.shapes:
            raise ValueError(
                f"{source} moves {name}, and {self.place} has no such weight{did_you_mean(name, self.shapes)}"
            )
        if self.shapes[name] != shape:
            raise ValueError(
                f"{source} moves {name} as a weight of shape {tuple(shape)}, and in {self.place} it has "
                f"{tuple(self.shapes[name])}; is it the right base?"
            )

    def check_untied(self, name: str, source: str) -> None:
        """Refuse an adapter's delta of one of several names of a tensor, as the adapter moves that one alone."""
        if len(twins := self.twins(name)) > 1:
            raise ValueError(
                f"{source} moves {name} alone, and in {self.place} {' and '.join(twins)} are one tensor (tied); import "
                "it against the base with untied embeddings (load it with tie_word_embeddings=False, and save it)"
            )

    def check_fit(self, shapes: Mapping[str, torch.Size], source: str = "the expert") -> None:
        """Refuse deltas that cannot be added: `check` for each, and each under the first name of its tensor."""
        for name, shape in shapes.items():
            self.check(name, shape, source)
            owner = self.owners[name]
            if owner != name:
                raise ValueError(
                    f"{name} is the same tensor as {owner} (tied), so it has no delta of its own; leave it out of the "
                    f"expert's modules, store the delta under {owner}, which moves both, or train on a base whose "
                    "embeddings are untied"
                )


def is_transposed(module: nn.Module) -> bool:
    """Return whether the module multiplies with a weight kept as `(in, out)`, as GPT-2's `Conv1D` does."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
