"""Statistics: what an expert's data say about one weight, for methods that need more than deltas.

A kind of statistics is known by its name (`fisher`, `gram`); what one is and how it is taken is said where it is taken,
in `modular_experts.statistics`. Where it is kept is the business of the library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

__all__ = ["Statistic", "known_statistics"]

Known = TypeVar("Known")


@dataclass(frozen=True, eq=False)
class Statistic:
    """A statistic of one weight on one expert's data.

    Attributes:
        values: Of the weight's shape where there is a number per entry (Fisher information), `(in, in)` where there is
            one per pair of a layer's inputs (Gram matrix).
        norm: Euclidean norm of the expert's statistic over all weights together.
        inputs: The dimension of the weight along which the layer's inputs are: 1 of `(out, in)`, as `nn.Linear` stores
            its weight, 0 of `(in, out)`, as GPT-2's `Conv1D` does.
    """

    values: Tensor
    norm: float = 1.0
    inputs: int = 1


def known_statistics(method: str, kind: str | None, known: Sequence[Known] | None, experts: int) -> Sequence[Known]:
    """Return what a method was informed of, one statistic per expert.

    Args:
        method: Name of the method.
        kind: The kind of statistics that it needs.
        known: What it was informed of, if it was.
        experts: Number of the experts.

    Raises:
        ValueError: It was not informed, or of another number of experts.
    """
    if known is None or len(known) != experts:
        found = "none were given" if known is None else f"{len(known)} were given for {experts} experts"
        raise ValueError(
            f"{method} needs {kind} statistics, one per expert, and {found}; call informed(...) first, or merge stored "
            "experts, whose statistics are found by themselves"
        )
    return known
