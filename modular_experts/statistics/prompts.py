"""Measure the prompts of an expert's tasks as vectors, from which routers learn; no answer is read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modular_experts.data.batch import IGNORED, Batch
from modular_experts.methods.method import DataStatistic
from modular_experts.routing.prompts import prompt_grams, prompt_vectors

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
GRAMS_NAME = "n-grams"
MOST_CUT = 0.75


def prompts(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    names: Sequence[str],
    parts: bool = False,
    depths: Sequence[float] = DEPTHS,
) -> dict[str, DataStatistic]:
    """Return the vectors of all prompts, `(rows, size)`, for each depth, under `depth 0.25` and so on, and `n-grams`.

    With `parts`, each prompt is followed by a part of itself, `(2 rows, size)`: without a share of its tokens at the
    front, between 0 and `MOST_CUT`, which is where an instruction stands. The shares are spread evenly.

    Args:
        names: The experts' weights, which do not matter here.
        depths: Where prompts are read, rising: after these shares of the transformer blocks.

    Raises:
        ValueError: There is no row.
    """
    found: list[list[Tensor]] = []
    rows = 0
    for batch in batches:
        ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
        prompt = (batch["labels"].to(model.device) != IGNORED).cumsum(1) == 0
        vectors = [*prompt_vectors(model, ids, mask, depths, prompt), prompt_grams(ids, mask, prompt)]
        if parts:
            read = prompt & mask.bool()
            lengths = read.sum(1)
            # Multiples of the golden ratio, without their whole parts, are spread evenly whatever the number of rows.
            shares = (torch.arange(rows + 1, rows + 1 + len(ids), device=ids.device) * 0.6180339887498949) % 1
            left_out = (MOST_CUT * shares * lengths).long().clamp(max=(lengths - 1).clamp(min=0))
            cut = mask * ~(read & (read.cumsum(1) <= left_out[:, None]))
            shorter = [*prompt_vectors(model, ids, cut, depths, prompt), prompt_grams(ids, cut, prompt)]
            vectors = [torch.stack(pair, 1).flatten(0, 1) for pair in zip(vectors, shorter, strict=True)]
        found.append(vectors)
        rows += len(ids)
    if not found:
        raise ValueError("prompts need at least one row, and there was none")
    names = [*map(name_of, depths), GRAMS_NAME]
    return {name: DataStatistic(torch.cat(parts)) for name, parts in zip(names, zip(*found, strict=True), strict=True)}


def name_of(depth: float) -> str:
    """Return the name under which the vectors of a depth are stored."""
    return f"depth {depth:g}"
