"""A ray as a LoRA of rank one, with all of its length in one factor."""

from torch import nn

from modular_experts.deltas import Delta, LowRank
from modular_experts.interop.peft import EncodedWeight, LoraFormat


class RayFormat(LoraFormat):
    """Writes experts of rank one alone."""

    def supports(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)

    def encode(self, name: str, module: nn.Module, delta: Delta) -> EncodedWeight:
        if not isinstance(delta, LowRank) or delta.rank != 1:
            raise ValueError(f"the delta of {name} is no ray; export the expert as lora")
        length = delta.down.norm()
        ray = LowRank(delta.up * length, delta.down / length)
        return EncodedWeight(ray, {"lora_A.weight": ray.down, "lora_B.weight": ray.up}, delta.norm() ** 2)
