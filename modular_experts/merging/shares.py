"""Shares: one weight per expert, as a user gives them, into fractions that sum to one."""

from __future__ import annotations

from collections.abc import Sequence

from modular_experts.merging.method import MergeMethod, check_finite, one_per_expert

__all__ = ["check_weights", "shares"]


def check_weights(method: MergeMethod, weights: Sequence[float] | None) -> None:
    """Refuse weights that are no shares of a whole: negative, not finite, or all zero.

    Raises:
        ValueError: One of these.
    """
    name = type(method).__name__
    for weight in weights or []:
        check_finite(method, "each weight", weight)
        if weight < 0:
            raise ValueError(f"{name}: each weight must be at least 0, got {weight}")
    if weights is not None and sum(weights) == 0:
        raise ValueError(f"{name}: the weights {weights} sum to zero, so they cannot be shares; give other weights")


def shares(method: MergeMethod, weights: Sequence[float] | None, count: int) -> list[float]:
    """Return the weights divided by their sum, or equal shares where none are given.

    Raises:
        ValueError: There is another number of weights than of experts.
    """
    weights = one_per_expert(method, "weights", weights, count)
    total = sum(weights)
    return [weight / total for weight in weights]
