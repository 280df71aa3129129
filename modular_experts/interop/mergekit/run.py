"""Run a recipe weight by weight, from the models' files into the files of the merged checkpoint.

One weight of each model is in memory at a time, and one of the result. Deltas, and the models where a method merges
models, are read in float32; the methods compute in float64.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from modular_experts.base.files import MANIFEST, copy_companions, write_manifest
from modular_experts.base.streaming import Layout, ShardWriter, write_index
from modular_experts.deltas import Sparse, all_finite
from modular_experts.interop.mergekit.inputs import Model, open_models
from modular_experts.interop.mergekit.recipe import ModelReference, Recipe, layer_positions
from modular_experts.library import check_target, new_directory
from modular_experts.library.record import read_json
from modular_experts.methods.method import Context
from modular_experts.progress import Progress


def merge_recipe(
    recipe: Recipe,
    out: str | Path,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress = iter,
    announce: Callable[[Sequence[Deviation]], object] = lambda found: None,
) -> Path:
    """Run a mergekit recipe, and write the merged model as a Hugging Face checkpoint.

    Args:
        recipe: The recipe, from `read_recipe`.
        out: Directory of the checkpoint.
        seed: Seed of the methods that drop entries at random.
        overwrite: Whether to replace a checkpoint of ours in that directory.
        announce: Function that gets the deviations from mergekit before the merge begins.

    Raises:
        FileExistsError: `out` exists and may not be replaced; nothing has been read yet.
        FileNotFoundError: A model or one of its files is missing.
        ValueError: The models do not fit together, a parameter is missing or impossible, or a result is not finite;
            nothing is written then.
    """
    target = check_target(out, overwrite, MANIFEST)
    models = open_models(recipe)
    donor = models[recipe.base or recipe.models[0]]
    stored, names = donor.stored, donor.stored.structure.weights
    positions = layer_positions(names, [part.layers for part in recipe.slices])
    steps = {name: recipe.step(name, positions[name], stored.shape(name).numel(), seed) for name in names}
    announce(list(deviations(recipe, models, names, [name for name in names if steps[name][1]])))
    named = recipe.out_dtype or recipe.dtype
    dtypes = {name: getattr(torch, named) if named else stored.dtype(name) for name in names}

    merging = [models[reference] for reference in recipe.merged]

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in progress(names):
            (method, silent), context = steps[name], Context(name)
            if recipe.on_deltas:
                zero = Sparse.zero(stored.shape(name))
                deltas = [zero if place in silent else model.delta(name, donor) for place, model in enumerate(merging)]
                merged = method.merge(deltas, context).add_to(donor.tensor(name))
            else:
                merged = method.merge([model.whole(name, dtypes[name]) for model in merging], context).dense()
            merged = merged.to(dtypes[name])
            if not all_finite(merged):
                raise ValueError(
                    f"{name} of the merge is not finite in {merged.dtype}; look at the recipe's weights, or write a "
                    "wider out_dtype"
                )
            yield stored.keys(name)[0], merged

    with new_directory(target, overwrite, MANIFEST) as temporary:
        layout = {stored.keys(name)[0]: (dtypes[name], tuple(stored.shape(name))) for name in names}
        write_shards(temporary, layout, tensors())
        copy_companions(donor.directory, temporary)
        kinds = [str(dtype).removeprefix("torch.") for dtype in dtypes.values()]
        _write_configuration(donor.directory, temporary, max(sorted(set(kinds)), key=kinds.count))
        directories = {str(reference): str(model.directory) for reference, model in models.items()}
        write_manifest(temporary, {"mergekit": recipe.source, "models": directories, "seed": seed})
    return target


def _write_configuration(source: Path, target: Path, dtype: str) -> None:
    config = read_json(source / "config.json", "so it is not the directory of a model")
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype  # the older name, and the newer
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_shards(
    directory: Path, layout: Layout, tensors: Iterable[tuple[str, Tensor]], limit: int = 2 * 10**9
) -> None:
    """Write the weights of a checkpoint into safetensors files of a limited size, one weight in memory at a time.

    A single file is named `model.safetensors`; several are numbered and listed in an index.

    Args:
        directory: Target directory.
        layout: Data type and shape of each weight, at least one.
        tensors: Name and value of each weight, in the order of the layout.
        limit: Bytes of a file, unless one weight alone has more.
    """
    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    size = 0
    for name, (dtype, shape) in layout.items():
        bytes_ = math.prod(shape) * dtype.itemsize
        if shards[-1] and size + bytes_ > limit:
            shards.append({})
            size = 0
        shards[-1][name] = dtype, shape
        size += bytes_
    count, coming = len(shards), iter(tensors)
    numbered = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    files = dict(zip(numbered if count > 1 else ["model.safetensors"], shards, strict=True))
    for file, part in files.items():
        with ShardWriter(directory / file, part) as writer:
            for expected in part:
                name, tensor = next(coming)
                assert name == expected
                writer.write(name, tensor)
    assert next(coming, None) is None
    if count > 1:
        write_index(directory, files)


class Deviation(NamedTuple):
    """What is done in another way than by mergekit 0.1.5, what `mergekit` does, and what is done `here`."""

    what: str
    mergekit: str
    here: str


_DRAWS = Deviation(
    "random numbers",
    "draws from one stream, so other numbers of threads, models or weights give other entries",
    "keeps each entry with the same probability; seed, weight, model and entry determine which",
)
_EQUAL = Deviation(
    "equal magnitudes",
    "keeps any of them, as its sort leaves them; models in bfloat16 have many",
    "keeps those that come first",
)
_OF_PRUNING = {
    **dict.fromkeys(["dare_linear", "dare_ties", "della", "della_linear"], (_DRAWS,)),
    **dict.fromkeys(["breadcrumbs", "breadcrumbs_ties", "sce", "ties"], (_EQUAL,)),
}
_OF_METHOD = {
    "slerp": Deviation("weight that is zero in one of the two models", "turns by a right angle", "goes straight"),
    "multislerp": Deviation("eps", "adds it to lengths", "does not need or use it"),
    "karcher": Deviation(
        "small angles",
        "takes them from a cosine in float32, so an angle below 3e-4 counts as 0",
        "takes them from a cosine in float64",
    ),
}


def deviations(
    recipe: Recipe, models: Mapping[ModelReference, Model], names: Iterable[str], silent: Iterable[str]
) -> Iterator[Deviation]:
    """Yield the deviations that a recipe comes across; breadcrumbs keeps nothing of a model in `silent` weights."""
    stored = {model.stored.dtype(model.stored.structure.weights[0]) for model in models.values()}
    narrow = next((str(dtype).removeprefix("torch.") for dtype in stored if dtype.itemsize < 4), "float32")
    computed = recipe.dtype or narrow
    if getattr(torch, computed).itemsize < 4:
        yield Deviation(
            "precision",
            f"rounds the models to {computed} and computes in it",
            "takes them as stored, computes in float64 and rounds the result once",
        )
    if any(value < 1 for name, rule in recipe.rules() if name in ("density", "select_topk") for value in rule.values):
        yield from _OF_PRUNING.get(recipe.name, ())
    if recipe.name in _OF_METHOD:
        yield _OF_METHOD[recipe.name]
    if any(reference.adapter for reference in models):
        yield Deviation(
            "model+adapter",
            "writes their sum to disk first, in the model's data type",
            "adds the adapter without rounding, and writes nothing",
        )
    if recipe.tokenizer and recipe.base:
        base = models[recipe.base]
        structure = base.stored.structure
        rows = max((structure.shapes[name][0] for name in structure.vocabulary), default=0)
        spare = rows - len(base.vocabulary() or ())
        if spare > 0:
            yield Deviation("tokenizer_source", f"cuts {spare} embeddings without a token", "keeps them")
    for name in list(silent)[:1]:
        yield Deviation(
            "density of less than one entry",
            f"keeps nothing of such a model, in {name} for one",
            "keeps nothing either, so that the numbers agree",
        )
    for part in dict.fromkeys(rule.part for _, rule in recipe.rules() if rule.part is not None):
        if not any(part in name for name in names):
            yield Deviation(
                f"filter {part!r}",
                "ignores it, as no weight's name contains it",
                "ignores it too; a filter is not a regular expression",
            )
