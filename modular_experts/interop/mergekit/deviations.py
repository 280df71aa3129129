"""List where our numbers may not be mergekit's, as far as a recipe and its models come across it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch

from modular_experts.interop.mergekit.inputs import Model
from modular_experts.interop.mergekit.recipe import ModelReference, Recipe


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
