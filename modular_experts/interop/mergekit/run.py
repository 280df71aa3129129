"""Running a recipe: weight by weight from the models' files into the files of the merged checkpoint.

One weight of each model is in memory at a time, and one of the result. Deltas, and the models where a method
merges models, are taken in float32; the methods compute in float64.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from modular_experts.base.files import MANIFEST, copy_companions, read_json, write_manifest
from modular_experts.base.shards import Layout
from modular_experts.deltas import Delta, Sparse, all_finite
from modular_experts.interop.mergekit.configuration import Configuration
from modular_experts.interop.mergekit.differences import Difference, differences
from modular_experts.interop.mergekit.inputs import Model, open_models
from modular_experts.interop.mergekit.recipe import Recipe
from modular_experts.interop.mergekit.references import Reference
from modular_experts.interop.mergekit.shards import write_shards
from modular_experts.interop.mergekit.vocabulary import check_vocabularies
from modular_experts.library import check_target, new_directory
from modular_experts.methods.method import Context
from modular_experts.progress import Progress

__all__ = ["merge_recipe"]

Announce = Callable[[Sequence[Difference]], object]


def merge_recipe(
    configuration: Configuration,
    out: str | Path,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress = iter,
    announce: Announce = lambda found: None,
) -> Path:
    """Run a mergekit recipe, and write the merged model as a Hugging Face checkpoint.

    Args:
        configuration: The recipe, from `read_configuration`.
        out: Directory of the checkpoint.
        seed: Of the methods that drop entries at random.
        overwrite: Whether a checkpoint of ours that is there may be replaced.
        progress: Wraps the names of the weights while they are gone through, for a progress bar.
        announce: Gets what is done in another way than by mergekit, before the merge begins.

    Returns:
        The directory.

    Raises:
        FileExistsError: `out` is there and may not be replaced; nothing has been read yet.
        FileNotFoundError: A model or a file of it is missing.
        ValueError: The models do not fit together, a parameter is missing or cannot be, or a result is not finite;
            nothing is written then.
    """
    target = check_target(out, overwrite, MANIFEST)
    models = open_models(configuration)
    if configuration.tokenizer and configuration.base:
        check_vocabularies(models[configuration.base], models.values())
    merge = _Merge(configuration, models, seed)
    announce(differences(configuration, models, merge.steps))
    with new_directory(target, overwrite, MANIFEST) as temporary:
        layout = merge.layout()
        write_shards(temporary, layout, merge.tensors(progress))
        copy_companions(merge.donor.directory, temporary)
        _write_config(merge.donor.directory, temporary, [dtype for dtype, _ in layout.values()])
        origin = {
            "mergekit": configuration.source,
            "models": {model.name: str(model.directory) for model in models.values()},
            "seed": seed,
        }
        write_manifest(temporary, origin)
    return target


class _Merge:
    """The weights of a merged model."""

    def __init__(self, configuration: Configuration, models: Mapping[Reference, Model], seed: int) -> None:
        self._models, self._configuration = models, configuration
        self.donor = models[configuration.base or configuration.models[0]]
        self._stored = self.donor.stored
        self._names = self._stored.structure.weights
        recipe = Recipe(configuration, self._names, seed)
        self.steps = {name: recipe.step(name, self._stored.shape(name).numel()) for name in self._names}
        self._dtype = configuration.out_dtype or configuration.dtype

    def layout(self) -> Layout:
        """Return the data type and shape of each weight of the result, under the name under which it is stored."""
        stored = self._stored
        return {stored.keys(name)[0]: (self._dtype_of(name), tuple(stored.shape(name))) for name in self._names}

    def tensors(self, progress: Progress) -> Iterator[tuple[str, Tensor]]:
        """Yield each weight of the result with the name under which it is stored."""
        for name in progress(self._names):
            merged = self._merged(name).to(self._dtype_of(name))
            if not all_finite(merged):
                raise ValueError(
                    f"{name} of the merge is not finite in {merged.dtype}; look at the recipe's weights, or write a "
                    "wider out_dtype"
                )
            yield self._stored.keys(name)[0], merged

    def _merged(self, name: str) -> Tensor:
        step = self.steps[name]
        models = [self._models[reference] for reference in step.models]
        if not self._configuration.on_deltas:
            wholes = [model.whole(name, self._dtype_of(name)) for model in models]
            return step.method.merge(wholes, Context(name)).dense()
        zero = Sparse.zero(self._stored.shape(name))
        deltas: list[Delta] = [
            zero if place in step.silent else model.delta(name, self.donor) for place, model in enumerate(models)
        ]
        return step.method.merge(deltas, Context(name)).add_to(self.donor.tensor(name))

    def _dtype_of(self, name: str) -> torch.dtype:
        if self._dtype is not None:
            return getattr(torch, self._dtype)
        return self._stored.dtype(name)


def _write_config(donor: Path, directory: Path, dtypes: Sequence[torch.dtype]) -> None:
    """Write the donor's configuration, with the data type that most weights have."""
    config = read_json(donor / "config.json", "so it is not the directory of a model")
    kinds = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    key = "torch_dtype" if "torch_dtype" in config else "dtype"  # the older name, and the newer
    config[key] = max(sorted(set(kinds)), key=kinds.count)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
