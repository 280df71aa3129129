"""SCE selects the entries on which the experts differ most, calculates the weight of each expert, and erases what is
against the elected sign (Wan et al., "FuseChat", arXiv 2402.16107 and 2408.07990).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from modular_experts.deltas import Delta
from modular_experts.masks import top_k
from modular_experts.methods.chunks import Chunk, FlatEntries, chunks_of, merge_by_chunks
from modular_experts.methods.method import Context, MergeMethod, Needs
from modular_experts.methods.settings import FROM_PRESET, Checks, Presets, finite, one_of, within

Zero = Literal["none", "positive"]
PRESETS: Presets = {
    None: {"keep": 1.0, "floor": 0.0, "zero": "none", "scale": 1.0},
    "mergekit": {"floor": 1e-6, "zero": "positive"},
}


@dataclass(frozen=True, kw_only=True)
class SCE(MergeMethod):
    """SCE: `scale * sum_i a_i c_i d_i / sum_i a_i c_i` on the entries of largest variance between the experts.

    `c_i` is expert i's share of the sum of squares over the selected entries of the weight, and `a_i` is 1 where `d_i`
    has the sign of `sum_j d_j`, else 0.

    Args:
        keep: Share of the entries with a variance other than zero that are selected, in [0, 1], rounded down, ties from
            the lowest flat index; 1 selects all entries of the weight. Default 1.
        scale: Factor of the result. Default 1.
        floor: Where the mean squares of the experts sum to less than this, all count alike; also the least that the sum
            is divided by. Default 0.
        zero: Sign where the deltas cancel: `none` (stay at the base, the default) or `positive`.
        preset: Fills what is not given: `mergekit` (floor 1e-6, zero positive).
    """

    presets = PRESETS
    checks = Checks(floor=finite, zero=one_of(Zero), keep=within("[0, 1]", "is the share of entries selected"))
    needs = Needs(matrices=4.0)

    keep: float = FROM_PRESET
    scale: float = FROM_PRESET
    floor: float = FROM_PRESET
    zero: Zero = FROM_PRESET
    preset: Literal["mergekit"] | None = None

    def merge(self, deltas: Sequence[Delta], context: Context | None = None) -> Delta:
        selected = None if self.keep == 1 else _most_varied(deltas, self.keep)
        squares = [0.0 for _ in deltas]
        for chunk in chunks_of(deltas):
            for expert, entries in enumerate(chunk):
                squares[expert] += _selected(entries, chunk, selected).double().square().sum().item()
        total = sum(squares)
        alike = total == 0 or total / deltas[0].shape.numel() < self.floor
        shares = [1 / len(deltas) if alike else square / total for square in squares]

        def rule(chunk: Chunk) -> tuple[Tensor, Tensor]:
            votes = chunk.zeros()
            for entries in chunk:
                entries.add_to(votes, _selected(entries, chunk, selected))
            elected = votes.sign_()
            if self.zero == "positive":
                elected += elected == 0
            summed = chunk.zeros()
            divisor = chunk.zeros()
            voters = chunk.zeros(torch.bool)
            least = self.floor or torch.finfo(divisor.dtype).tiny
            for share, entries in zip(shares, chunk, strict=True):
                values = _selected(entries, chunk, selected)
                agrees = values * entries.of(elected) > 0
                entries.add_to(summed, values * agrees, share)
                entries.add_to(divisor, agrees, share)
                entries.mark(voters, agrees)
            return summed.mul_(self.scale).div_(divisor.clamp_(min=least)), voters

        return merge_by_chunks(deltas, rule)


def _selected(entries: FlatEntries, chunk: Chunk, selected: Tensor | None) -> Tensor:
    """Return an expert's values, zero where the entry is not selected."""
    return entries.values if selected is None else entries.values * entries.of(selected[slice(*chunk.span)])


def _most_varied(deltas: Sequence[Delta], keep: float) -> Tensor:
    """Return which flat entries are selected, as booleans."""
    variance = torch.empty(deltas[0].shape.numel(), dtype=torch.float64, device=deltas[0].device)
    for chunk in chunks_of(deltas):
        mean = chunk.total().div_(len(deltas))
        square = chunk.zeros()
        absent = chunk.zeros().fill_(len(deltas))
        for entries in chunk:
            entries.add_to(square, (entries.values.double() - entries.of(mean)).square())
            entries.add_to(absent, torch.ones_like(entries.values), -1.0)
        spread = square + absent * mean.square()
        # Equal values have a variance of zero, though rounding may move their mean.
        least = len(deltas) * (torch.finfo(torch.float64).eps * mean).square()
        variance[slice(*chunk.span)] = torch.where(spread > least, spread, 0.0)
    count = int(keep * int(variance.count_nonzero()) * (1 + 1e-12))
    selected = torch.zeros_like(variance, dtype=torch.bool)
    selected[top_k(variance, count).long()] = True
    return selected
