"""Model Stock goes towards the average, the further the smaller the angles between the deltas are (Jang et al., "Model
Stock", arXiv 2403.19522).

The paper derives the step for one angle; here as in mergekit its cosine is the mean over all pairs of experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from modular_experts.deltas import Delta
from modular_experts.deltas.algebra import scale_rows
from modular_experts.methods.chunks import chunks_of, weighted_sum, widest_dtype
from modular_experts.methods.method import Context, MergeMethod
from modular_experts.methods.settings import Presets

PRESETS: Presets = {None: {}, "mergekit": {}}

# What mergekit takes for the product of two lengths if it is smaller, so that the cosine of tiny deltas shrinks.
SHORTEST = 1e-6


@dataclass(frozen=True)
class ModelStock(MergeMethod):
    """Model Stock: `scale * t * mean_i d_i` with `t = N c / (1 + (N - 1) c)`, where the mean is over the N experts that
    move the weight, and c is the mean cosine between the deltas of two of them.

    One expert alone has t = 1. Where c < 0, t is 0 and the weight stays at the base. It is meant for experts of one
    task: deltas of different tasks are nearly orthogonal, so that they nearly vanish.

    Args:
        row_wise: Give each row `(in,)` of a weight `(out, in)` a cosine and a step of its own (mergekit's `filter_wise:
            true`).
        preset: `mergekit` counts all experts, also those that do not move the weight, and steps backwards where c < 0.
    """

    presets = PRESETS
    scale: float = 1.0
    row_wise: bool = False
    preset: Literal["mergekit"] | None = None

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        if self.row_wise or self.preset:
            factors = self._factors(deltas)
            total = weighted_sum(deltas, self.scale, torch.float64)
            merged = scale_rows(total, factors) if self.row_wise else total * factors.item()
            return merged.to(dtype=widest_dtype(deltas))
        norms = [0.0 if delta.is_empty else delta.norm() for delta in deltas]
        movers = sum(norm > 0 for norm in norms)
        step = 1.0
        if movers > 1:
            # The squared norm s of the sum of the unit deltas is N + N (N - 1) c, so t = N / (N - 1) * (1 - N / s): one
            # sum instead of all pairs.
            units = weighted_sum(deltas, [1 / norm if norm > 0 else 0.0 for norm in norms], dtype=torch.float64)
            square = units.norm() ** 2
            step = movers / (movers - 1) * (1 - movers / square) if square > movers else 0.0
        return weighted_sum(deltas, self.scale * step / max(movers, 1))

    def _factors(self, deltas: Sequence[Delta]) -> Tensor:
        """Return `t / N`, from the cosine of each pair: float64 `(rows,)`, or `(1,)` for the whole weight."""
        by_row = self.row_wise and len(deltas[0].shape) > 1
        grams = []
        for chunk in chunks_of(deltas):
            dense = chunk.zeros(torch.float64).repeat(len(deltas), 1)
            for entries, values in zip(chunk, dense, strict=True):
                entries.add_to(values)
            vectors = dense.view(len(deltas), -1, chunk.width if by_row else dense.shape[1]).transpose(0, 1)
            grams.append(vectors @ vectors.mT)
        # inner products of all pairs, (rows, experts, experts)
        gram = torch.cat(grams) if by_row else torch.cat(grams).sum(0, keepdim=True)
        lengths = gram.diagonal(dim1=1, dim2=2).sqrt()
        i, j = torch.triu_indices(len(deltas), len(deltas), 1)  # of every pair
        shortest = SHORTEST if self.preset else torch.finfo(torch.float64).tiny
        cosines = gram[:, i, j] / (lengths[:, i] * lengths[:, j]).clamp(min=shortest)
        total = cosines.clamp(-1, 1).sum(1)
        count = torch.full_like(total, len(deltas)) if self.preset else (lengths > 0).sum(1).clamp(min=1).double()
        # One expert alone has no pair, and is taken whole.
        cosine = torch.where(count > 1, total / (count * (count - 1) / 2), 1.0)
        if not self.preset:
            cosine = cosine.clamp(min=0)
        return cosine / (1 + (count - 1) * cosine)
