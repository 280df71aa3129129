"""Differences: where the numbers of a recipe may not be mergekit's, as far as this recipe and these models meet it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from modular_experts.interop.mergekit.configuration import Configuration
from modular_experts.interop.mergekit.inputs import Model
from modular_experts.interop.mergekit.recipe import Step
from modular_experts.interop.mergekit.references import Reference
from modular_experts.interop.mergekit.vocabulary import spare_rows

__all__ = ["Difference", "differences"]

_AT_RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
_BY_MAGNITUDE = ("ties", "breadcrumbs", "breadcrumbs_ties", "sce")


@dataclass(frozen=True)
class Difference:
    """One thing that is done in another way.

    Attributes:
        what: What it is about.
        mergekit: What mergekit 0.1.4 does.
        here: What is done here.
    """

    what: str
    mergekit: str
    here: str


def differences(
    configuration: Configuration, models: Mapping[Reference, Model], steps: Mapping[str, Step]
) -> list[Difference]:
    """Return the differences that a recipe meets.

    Args:
        configuration: The recipe.
        models: Its models.
        steps: The merge of each weight.
    """
    found = [*_precision(configuration, models), *_pruning(configuration), *_angles(configuration)]
    found += [*_inputs(configuration, models), *_silent(steps), *_idle_filters(configuration, steps)]
    return found


def _precision(configuration: Configuration, models: Mapping[Reference, Model]) -> Iterator[Difference]:
    name = configuration.dtype
    if name is None:
        stored = {model.stored.dtype(model.stored.structure.weights[0]) for model in models.values()}
        name = next((str(dtype).removeprefix("torch.") for dtype in stored if dtype.itemsize < 4), "float32")
    if getattr(torch, name).itemsize < 4:
        yield Difference(
            "precision",
            f"rounds the models to {name} and computes in it",
            "takes them as stored, computes in float64 and rounds the result once",
        )


def _pruning(configuration: Configuration) -> Iterator[Difference]:
    prunes = any(value < 1 for name in ("density", "select_topk") for value in configuration.values(name))
    if configuration.name in _AT_RANDOM and prunes:
        yield Difference(
            "random numbers",
            "draws from one stream, so other numbers of threads, models or weights give other entries",
            "keeps each entry with the same probability; which ones follows from seed, weight, model and entry",
        )
    if configuration.name in _BY_MAGNITUDE and prunes:
        yield Difference(
            "equal magnitudes",
            "keeps any of them, as its sort leaves them; models in bfloat16 have many",
            "keeps those that come first",
        )
    if configuration.name == "ties" and prunes:
        yield Difference("density of less than one entry", "stops", "keeps one entry")


def _angles(configuration: Configuration) -> Iterator[Difference]:
    if configuration.name == "slerp":
        yield Difference(
            "weight that is zero in one of the two models", "turns by a right angle", "goes along the straight line"
        )
    if configuration.name == "multislerp":
        yield Difference("eps", "adds it to lengths", "needs none, and does not use it")
    if configuration.name == "karcher":
        yield Difference(
            "small angles",
            "has them from a cosine in float32, which tells none below 3e-4 from 0",
            "has them from a cosine in float64",
        )


def _inputs(configuration: Configuration, models: Mapping[Reference, Model]) -> Iterator[Difference]:
    if any(reference.adapter for reference in models):
        yield Difference(
            "model+adapter",
            "writes their sum to disk first, in the model's data type",
            "adds the adapter without rounding, and writes nothing",
        )
    rows = spare_rows(models[configuration.base]) if configuration.tokenizer and configuration.base else 0
    if rows:
        yield Difference("tokenizer_source", f"cuts {rows} embeddings without a token", "keeps them")


def _silent(steps: Mapping[str, Step]) -> Iterator[Difference]:
    silent = [name for name, step in steps.items() if step.silent]
    if silent:
        more = f" and {len(silent) - 1} more" if len(silent) > 1 else ""
        yield Difference(
            "gamma of less than one entry",
            f"keeps nothing of such a model there ({silent[0]}{more})",
            "keeps nothing either, so that the numbers agree",
        )


def _idle_filters(configuration: Configuration, steps: Mapping[str, Step]) -> Iterator[Difference]:
    parts = dict.fromkeys(rule.part for rule in configuration.rules if rule.part is not None)
    for part in parts:
        if not any(part in name for name in steps):
            yield Difference(
                f"filter {part!r}",
                "passes over it, as it is part of no weight's name",
                "passes over it too; a filter is no regular expression",
            )
