"""Measure the prompts of an expert's tasks as vectors, from which routers learn; no answer is read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from transformers import PreTrainedModel

from modular_experts.data.batch import IGNORED, Batch
from modular_experts.injection.routed import prompt_vectors
from modular_experts.methods.method import DataStatistic

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def prompts(model: PreTrainedModel, batches: Iterable[Batch], names: Sequence[str]) -> dict[str, DataStatistic]:
    """Return the vectors of all prompts, `(rows, size)`, for each of `DEPTHS`, under `depth 0.25` and so on.

    Args:
        model: The base, without experts.
        batches: Batches as `data/batch.py` describes them.
        names: The experts' weights, which do not matter here.

    Raises:
        ValueError: There is no row.
    """
    training, found = model.training, []
    try:
        model.eval()
        for batch in batches:
            ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
            prompt = (batch["labels"].to(model.device) != IGNORED).cumsum(1) == 0
            found.append(prompt_vectors(model, ids, mask, DEPTHS, prompt))
    finally:
        model.train(training)
    if not found:
        raise ValueError("prompts need at least one row, and there was none")
    return {
        name_of(depth): DataStatistic(torch.cat(rows))
        for depth, rows in zip(DEPTHS, zip(*found, strict=True), strict=True)
    }


def name_of(depth: float) -> str:
    """Return the name under which the vectors of a depth are stored."""
    return f"depth {depth:g}"
