"""Skeletons: the weights that a checkpoint's model has - names, shapes, which are one tensor - without their numbers.

The model is built from its configuration on torch's `meta` device, where a weight takes no memory. Files and their
bytes are `stored.py`'s.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from modular_experts.base.checkpoint import quiet

__all__ = ["Skeleton", "read_skeleton"]

_UNUSED = (r"(^|\.)rotary_emb\.inv_freq$", r"(^|\.)attn\.(masked_)?bias$", r"(^|\.)attention\.(masked_)?bias$")


@dataclass(frozen=True)
class Skeleton:
    """What a checkpoint's model is made of.

    Attributes:
        place: How the checkpoint is called in a sentence.
        model: Name of the model's class.
        shapes: Shape of each weight by each of its names; a tied tensor has several.
        owners: For each name the first name of its tensor, under which a delta of it is stored.
        vocabulary: First names of the weights with a row for each token: embeddings, the head and its bias.
        unused: Patterns of tensors that files of this architecture may hold although the model has no use for them.
        prefix: First part of the names, which files of the bare model leave out.
        renamings: Returns how transformers renames what files of this architecture hold, which takes it a while.
    """

    place: str
    model: str
    shapes: dict[str, torch.Size]
    owners: dict[str, str]
    vocabulary: frozenset[str]
    unused: tuple[str, ...]
    prefix: str
    renamings: Callable[[], list[WeightRenaming]]

    def name_of(self, key: str) -> str | None:
        """Return the name of a stored tensor in the model, or none if it is no weight of it under this name.

        Tensors that transformers would first cut or put together, such as the experts of a mixture, have none.
        """
        if key in self.shapes:
            return key
        name, _ = rename_source_key(key, self.renamings(), [], self.prefix, self.shapes)
        return name if name in self.shapes else None

    def weights(self) -> list[str]:
        """Return the first name of each weight, sorted."""
        return sorted(set(self.owners.values()))

    def twins(self, name: str) -> list[str]:
        """Return all names of a weight's tensor; more than one if it is tied."""
        return [other for other, owner in self.owners.items() if owner == self.owners[name]]

    def is_unused(self, key: str) -> bool:
        """Return whether a file may hold this tensor for nothing, such as a mask that older versions stored."""
        return any(re.search(pattern, key) for pattern in self.unused)

    def check(self, name: str, shape: torch.Size, source: str) -> None:
        """Refuse a delta that does not fit.

        Args:
            name: Weight that the delta moves.
            shape: Shape of the delta.
            source: Where it comes from, for the sentence.

        Raises:
            ValueError: There is no such weight, or it has another shape.
        """
        if name not in self.shapes:
            raise ValueError(
                f"{source} moves {name}, and {self.place} has no such weight{self.near(name)}; is it the right base?"
            )
        if self.shapes[name] != shape:
            raise ValueError(
                f"{source} moves {name} as a weight of shape {tuple(shape)}, and in {self.place} it has "
                f"{tuple(self.shapes[name])}; is it the right base?"
            )

    def near(self, name: str) -> str:
        """Return `; the nearest is x`, or nothing where no name is near."""
        found = difflib.get_close_matches(name, list(self.shapes), n=1)
        return f"; the nearest is {found[0]}" if found else ""


def read_skeleton(directory: Path) -> Skeleton:
    """Return the skeleton of a causal language model.

    Args:
        directory: A model directory, as `resolve_base` gives it.
    """
    with quiet(), torch.device("meta"):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    owners = {name: first.setdefault(id(weight), name) for name, weight in parameters.items()}
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return Skeleton(
        place=str(directory),
        model=type(model).__name__,
        shapes={name: weight.shape for name, weight in parameters.items()},
        owners=owners,
        vocabulary=_rows_are_tokens(model, parameters, owners),
        unused=(*_UNUSED, *patterns),
        prefix=model.base_model_prefix,
        renamings=cache(
            lambda: [way for way in get_model_conversion_mapping(model) if isinstance(way, WeightRenaming)]
        ),
    )


def _rows_are_tokens(model: nn.Module, parameters: dict[str, nn.Parameter], owners: dict[str, str]) -> frozenset[str]:
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
    theirs = {id(weight) for layer in layers if layer is not None for weight in layer.parameters()}
    return frozenset(owners[name] for name, weight in parameters.items() if id(weight) in theirs)
