"""A system of several parts, written as a user would: a gate of each transformer block, which the parts inside read."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modular_experts.deltas import Delta
from modular_experts.experts import Expert, LoRAExpert, ModuleExpert, Site
from modular_experts.experts.module_expert import refer
from modular_experts.experts.site import LayerPlan
from modular_experts.text import block_of


class BlockGate(ModuleExpert):
    """Owns a gate that sees what enters the block, and shows it to the block's experts."""

    share: Tensor

    def __init__(self, size: int, penalty: float) -> None:
        super().__init__()
        self.weight, self.factor = nn.Parameter(torch.zeros(size)), penalty

    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self.share = torch.sigmoid(hidden.to(self.weight.dtype) @ self.weight)[..., None]

    def extra_loss(self) -> dict[str, Tensor]:
        return {"BlockGate": self.factor * (self.weight - 1).square().sum()}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "share"}


class GatedLoRA(Expert):
    """Adds a LoRA's output by its block's gate."""

    mergeable: ClassVar[bool] = False
    not_mergeable_because: ClassVar[str] = "its gate sees the block's input"
    gate: BlockGate

    def __init__(self, weight: Tensor, gate: BlockGate) -> None:
        super().__init__()
        self.lora = LoRAExpert(weight, rank=2)
        refer(self, gate=gate)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = F.linear(x, weight, bias)
        return out + self.gate.share.to(out.dtype) * self.lora.delta(weight, lambda: weight).linear(x)

    def delta(self, weight: Tensor, anchor: Callable[[], Tensor]) -> Delta:
        raise NotImplementedError(self.not_mergeable_because)


class Shift(ModuleExpert):
    """Adds a trained vector to a module's output."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(size))

    def after(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return output + self.shift.to(output.dtype)


class Scale(ModuleExpert):
    """Multiplies the logits of the whole model by a trained factor."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))

    def after(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if isinstance(output, Tensor):
            return output * self.factor.to(output.dtype)
        output.logits = output.logits * self.factor.to(output.logits.dtype)
        return output


class SharedGate(LayerPlan):
    """A gate in each block, LoRAs behind it, a vector at each MLP, and a factor of the logits."""

    def __init__(self, layers: Sequence[str] = ("q_proj", "down_proj"), penalty: float = 0.1) -> None:
        self.layers, self.penalty = list(layers), penalty

    def __call__(self, sites: Sequence[Site]) -> Mapping[Any, Callable[..., Any]]:
        gates: dict[str, BlockGate] = {}

        planned: dict[Any, Callable[..., Any]] = {"": lambda module: Scale()}
        for site in sites:
            block = block_of(f"{site.name}.")
            if block is None or site.layer not in self.layers:
                continue
            size = min(site.module.weight.shape)
            planned[site] = lambda weight, block=block: GatedLoRA(weight, gates[block])
            planned[block] = lambda module, block=block, size=size: gates.setdefault(
                block, BlockGate(size, self.penalty)
            )
            planned[f"{block}.mlp"] = lambda module, size=size: Shift(size)
        return planned
