"""LoRA: low-rank deltas exactly, any other ones as their nearest product of a rank."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from modular_experts.deltas import Delta, LowRank
from modular_experts.interop.peft.best_rank import best_rank
from modular_experts.interop.peft.form import Carried, PeftForm
from modular_experts.interop.peft.layers import is_embedding, is_linear, is_transposed

__all__ = ["LoraForm"]


@dataclass(frozen=True)
class LoraForm(PeftForm):
    """A LoRA adapter, whose factors multiply to the delta: `lora_alpha` is the rank, so nothing is scaled.

    Args:
        rank: Largest rank. A low-rank delta up to it stays exact; any other one becomes its best approximation of that
            rank. Without it only low-rank deltas are carried, of whatever rank, exactly.
    """

    rank: int | None = None

    peft_type = "LORA"
    carries = "Linear, Conv1D and Embedding"

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")

    def takes(self, module: nn.Module) -> bool:
        return is_linear(module) or is_transposed(module) or is_embedding(module)

    def carry(self, name: str, module: nn.Module, delta: Delta) -> Carried:
        if self.rank is None and not isinstance(delta, LowRank):
            raise ValueError(
                f"the delta of {name} is {type(delta).__name__} and no product of two factors; give a rank to "
                "approximate it, or export a sparse expert as supertuning or shira"
            )
        product, lost = best_rank(delta, self.rank or min(delta.shape) + max(delta.shape))
        return Carried(product, _tensors(module, product), delta.norm() ** 2, lost)

    def configuration(self, modules: Mapping[str, nn.Module], carried: Mapping[str, Carried]) -> dict[str, Any]:
        ranks = {name.removesuffix(".weight"): weight.delta.rank for name, weight in carried.items()}  # type: ignore[attr-defined]
        usual = max(Counter(ranks.values()).items(), key=lambda item: item[::-1])[0]
        others = {re.escape(name): rank for name, rank in ranks.items() if rank != usual}
        return {
            "r": usual,
            "lora_alpha": usual,
            "rank_pattern": others,
            "alpha_pattern": others,
            "fan_in_fan_out": all(is_transposed(module) for module in modules.values()),
            "bias": "none",
            "lora_dropout": 0.0,
            "init_lora_weights": True,
            "use_rslora": False,
        }


def _tensors(module: nn.Module, delta: LowRank) -> dict[str, Tensor]:
    if is_linear(module):
        return {"lora_A.weight": delta.down, "lora_B.weight": delta.up}
    if is_embedding(module):
        return {"lora_embedding_A": delta.up.T, "lora_embedding_B": delta.down.T}
    return {"lora_A.weight": delta.up.T, "lora_B.weight": delta.down.T}
