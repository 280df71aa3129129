"""Plan mixtures whose numbers of experts and ranks depend on the depth (HiLo, arXiv 2502.03884)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from modular_experts.experts.site import Factory, LayerPlan, Site, by_pattern
from modular_experts.routing.molora import MoLoRAExpert


class HiLo(LayerPlan):
    """Mixtures of LoRAs with few experts of low rank in early blocks, and more of higher rank in late ones.

    The blocks are divided into as many groups, equally long, as `experts` has numbers; all layers of a block of group
    `j` get `experts[j]` experts. The rank goes from `ranks[0]` at the first block to `ranks[1]` at the last, linear in
    the depth and rounded. Plans like MoLA's (experts by depth, one rank) and AlphaLoRA's (numbers from a measure of
    each group) are the same function with other numbers.

    No code of the paper was found, and its exact rule for the number of experts was not: the groups follow its best
    setting, "2468". The balance loss is MoLoRA's.

    Args:
        modules: Patterns of the layers that get a mixture: ends of names, regular expressions, or `all-linear`.
        experts: Number of experts of each group of blocks.
        ranks: Rank of an expert at the first and at the last block.
        k: How many experts a token takes; fewer where a layer has fewer.
        alpha: The scale is alpha / rank.
        balance: Weight of the penalty that keeps the experts in use.
    """

    def __init__(
        self,
        modules: str | Sequence[str] = "all-linear",
        experts: Sequence[int] = (2, 4, 6, 8),
        ranks: Sequence[int] = (2, 8),
        k: int = 2,
        alpha: float = 16.0,
        balance: float = 1e-3,
    ) -> None:
        if not experts or min(experts) < 1:
            raise ValueError(
                f"HiLo: experts={list(experts)} must be numbers of at least 1, one for each group of blocks"
            )
        if len(ranks) != 2 or min(ranks) < 1:
            raise ValueError(f"HiLo: ranks={list(ranks)} must be two numbers, the rank at the first and the last block")
        if k < 1:
            raise ValueError(f"HiLo: k={k} must be at least 1")
        self.modules = [modules] if isinstance(modules, str) else list(modules)
        self.experts, self.ranks, self.k, self.alpha, self.balance = list(experts), list(ranks), k, alpha, balance

    def __call__(self, sites: Sequence[Site]) -> Mapping[Any, Factory]:
        chosen = by_pattern(dict.fromkeys(self.modules, MoLoRAExpert), "modules")(sites)
        depths = [site.depth for site in sites if site.depth is not None]
        last = max(depths, default=0)
        planned = {}
        for site in chosen:
            depth = last if site.depth is None else site.depth
            count = self.experts[depth * len(self.experts) // (last + 1)]
            low, high = self.ranks
            planned[site] = partial(
                MoLoRAExpert,
                experts=count,
                rank=round(low + (high - low) * depth / max(last, 1)),
                k=min(self.k, count),
                alpha=self.alpha,
                balance=self.balance,
            )
        return planned
