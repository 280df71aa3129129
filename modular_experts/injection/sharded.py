"""Shard the frozen base of a model over processes, by FSDP2; what experts train stays whole in each process.

A weight is whole during the passes of its transformer block only, so an expert that writes into it would write into a
copy: its layer adds what is trained whenever the weight is read, as beside a quantised weight.
"""

from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from modular_experts.base.quantised import is_quantised
from modular_experts.experts.expert import InPlaceExpert
from modular_experts.injection.inject import expert_layers
from modular_experts.injection.layers import ExpertLinear
from modular_experts.kernels.quantised import QuantisedWeight
from modular_experts.text import block_of


class ExpertSharded(ExpertLinear):
    """A linear layer with an expert that reads the weight, of which each process holds some rows between passes."""

    @property
    def matrix(self) -> Tensor:
        return QuantisedWeight.of(self._whole, self.weight.shape, self.weight.dtype, self.weight.device)

    def _whole(self) -> Tensor:
        weight = self.weight.detach()
        return weight.full_tensor() if isinstance(weight, DTensor) else weight.clone()

    # torch.compile cannot trace a tensor that is made anew at each reading.
    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def shard(model: nn.Module, device: torch.device) -> None:
    """Let each process hold its part of each frozen weight; all of them call it, with the experts in the model.

    Raises:
        ValueError: The base is quantised, or an expert trains the weight itself or needs it for its delta.
    """
    if quantised := [name for name, module in model.named_modules() if is_quantised(module)]:
        raise ValueError(f"{quantised[0]} is quantised, and cannot be parted; leave out shard_base or quantise")
    for name, layer in expert_layers(model):
        expert: Any = layer.expert
        in_place = isinstance(expert, InPlaceExpert)
        if expert.delta_of_base or (in_place and not (expert.takes_quantised and type(layer) is ExpertLinear)):
            raise ValueError(
                f"{type(expert).__name__} writes into {name} or needs it whole, and shard_base parts it; take a "
                "sparse or low-rank expert on linear layers, or leave shard_base out"
            )
        if in_place:
            expert.restore(layer.matrix, lambda: None)
            layer.__class__ = ExpertSharded
            expert.anchor = expert.anchor.new_empty(0)
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    blocks = dict.fromkeys(block for name, _ in model.named_parameters() if (block := block_of(name)))
    for module in [*map(model.get_submodule, blocks), model]:
        fully_shard(module, mesh=mesh, ignored_params=trained)
