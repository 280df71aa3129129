"""How sure a difference between two ways is, over pairs of seed and task."""

from __future__ import annotations

from collections.abc import Mapping

import torch

__all__ = ["interval"]


def interval(mine: Mapping[tuple[int, str], float], theirs: Mapping[tuple[int, str], float]) -> list[float]:
    """Return the 95 % interval of the mean difference over the pairs that both have, by 2,000 bootstrap draws."""
    differences = torch.tensor([mine[pair] - theirs[pair] for pair in sorted(mine.keys() & theirs.keys())])
    draws = torch.randint(len(differences), (2000, len(differences)), generator=torch.Generator().manual_seed(0))
    means = differences[draws].mean(1)
    return [means.quantile(0.025).item(), means.quantile(0.975).item()]
