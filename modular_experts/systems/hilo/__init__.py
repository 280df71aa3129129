"""Plan mixtures whose numbers of experts and ranks depend on the depth (HiLo, arXiv 2502.03884)."""

from collections.abc import Mapping, Sequence
from functools import partial

from modular_experts.experts.site import Factory, LayerPlan, Site, as_patterns, by_pattern
from modular_experts.systems.molora import MoLoRAExpert


class HiLo(LayerPlan):
    """Mixtures of LoRAs with few experts of low rank in early blocks, and more of higher rank in late ones.

    Each of `experts`, `ranks` and `k` divides the blocks into as many groups, equally long, as it has numbers; all
    layers of a block of group `j` get number `j`. Two `ranks` are a line instead of two groups: from `ranks[0]` at the
    first block to `ranks[1]` at the last, rounded. MoLA's plan (experts by depth, one rank) is the same with other
    numbers. The balance loss is MoLoRA's.

    Args:
        modules: Patterns of the layers that get a mixture: ends of names, regular expressions, or `all-linear`.
        experts: Number of experts of each group of blocks.
        ranks: Rank of an expert at the first and at the last block, or in each group, if they are not two.
        k: How many experts a token takes, in all blocks or in each group; fewer where a layer has fewer.
        alpha: The scale is alpha / rank.
        balance: Weight of the penalty that keeps the experts in use.
    """

    def __init__(
        self,
        modules: str | Sequence[str] = "all-linear",
        experts: Sequence[int] = (2, 4, 6, 8),
        ranks: Sequence[int] = (2, 8),
        k: int | Sequence[int] = 2,
        alpha: float = 16.0,
        balance: float = 1e-3,
    ) -> None:
        self.modules = as_patterns(modules)
        self.experts = list(experts)
        self.ranks = list(ranks)
        self.k = [k] if isinstance(k, int) else list(k)
        self.alpha = alpha
        self.balance = balance
        for name, numbers in (("experts", self.experts), ("ranks", self.ranks), ("k", self.k)):
            if not numbers or min(numbers) < 1:
                raise ValueError(f"HiLo: {name}={numbers} must be numbers of at least 1, one for each group of blocks")

    def __call__(self, sites: Sequence[Site]) -> Mapping[Site, Factory]:
        chosen = by_pattern(dict.fromkeys(self.modules, MoLoRAExpert), "modules")(sites)
        depths = [site.depth for site in sites if site.depth is not None]
        blocks = max(depths, default=0) + 1
        planned = {}
        for site in chosen:
            depth = blocks - 1 if site.depth is None else site.depth
            count, rank, k = (numbers[depth * len(numbers) // blocks] for numbers in (self.experts, self.ranks, self.k))
            if len(self.ranks) == 2:
                low, high = self.ranks
                rank = round(low + (high - low) * depth / max(blocks - 1, 1))
            planned[site] = partial(
                MoLoRAExpert, experts=count, rank=rank, k=min(k, count), alpha=self.alpha, balance=self.balance
            )
        return planned
