"""Shard the frozen base of a model over processes, by FSDP2; what experts train stays whole in each process.

A weight is whole during the passes of its transformer block only, so an expert that writes into it would write into a
copy: its layer adds what is trained whenever the weight is read, as beside a quantised weight.
"""

import logging
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from modular_experts.base.quantised import hold_rows, is_quantised, read_weight
from modular_experts.experts.expert import InPlaceExpert
from modular_experts.experts.selectable import Selectable
from modular_experts.injection.inject import expert_layers
from modular_experts.injection.layers import ExpertConv1D, ExpertLayer, ExpertLinear, ExpertQuantised
from modular_experts.injection.slices import ExpertSlice
from modular_experts.native.transient import TransientWeight
from modular_experts.routing.gates import reading
from modular_experts.text import block_of

log = logging.getLogger(__name__)


class ExpertSharded(ExpertLinear):
    """A linear layer with an expert that reads the weight, of which each process holds some rows between passes."""

    @property
    def matrix(self) -> Tensor:
        return TransientWeight.of(self._whole, self.weight.shape, self.weight.dtype, self.weight.device)

    def _whole(self) -> Tensor:
        weight = self.weight.detach()
        return weight.full_tensor() if isinstance(weight, DTensor) else weight.clone()

    # torch.compile cannot trace a tensor that is made anew at each reading.
    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class QuantisedRows(nn.Linear):
    """A quantised linear layer without an expert, of which each process holds some rows between passes.

    It multiplies with the dequantised weight. On a GPU, bitsandbytes would round the inputs of its 8-bit layers.
    """

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, read_weight(self), self.bias)


def shard(model: nn.Module, device: torch.device) -> None:
    """Let each process hold its part of each frozen weight; all of them call it, with the experts in the model.

    A quantised weight stays whole in each process where its bytes cannot be parted by rows.
    """
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    quantised = [module for module in model.modules() if is_quantised(module)]
    packed = {cast(nn.Parameter, module.weight) for module in quantised if not hold_rows(module)}
    layers = {name: layer for name, layer in expert_layers(model) if layer.weight not in trained | packed}
    for name, layer in layers.items():
        _check(name, layer)
    for layer in layers.values():
        expert = layer.expert
        if isinstance(expert, InPlaceExpert) and not isinstance(layer, ExpertQuantised):
            matrix = layer.matrix
            expert.restore(matrix, matrix.detach)
            layer.__class__ = ExpertSharded
            # Nothing overwrites the base's entries in a weight that is read anew.
            expert.anchor = cast(Tensor, expert.anchor).new_empty(0)
        elif isinstance(layer, ExpertConv1D):
            # FSDP2 takes contiguous weights only.
            layer.weight.data = layer.weight.data.contiguous()
    for module in quantised:
        if module.weight not in packed and not isinstance(module, ExpertQuantised):
            module.__class__ = QuantisedRows
    if packed:
        shared = set(model.parameters()) - trained - packed
        log.info(
            "%.0f MiB of quantised weights stay whole in each process, which share the other %.0f MiB",
            sum(parameter.nbytes for parameter in packed) / 2**20,
            sum(parameter.nbytes for parameter in shared) / 2**20,
        )
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    blocks = dict.fromkeys(block_of(name) for name, _ in model.named_parameters())
    # Parameters outside of blocks belong to the model itself.
    for module in [*(model.get_submodule(block) for block in blocks if block), model]:
        fully_shard(module, mesh=mesh, ignored_params=trained | packed)
    # Before FSDP2's own hook, which gathers the first weights.
    model.register_forward_pre_hook(_announce, prepend=True)


def _announce(model: nn.Module, arguments: object) -> None:
    if not torch.is_grad_enabled():
        _going(model, 1)


def _going(model: nn.Module, own: int) -> bool:
    """Return whether any process makes a pass now, which each of them tells the others."""
    passes = torch.tensor(own, device=next(model.parameters()).device)
    distributed.all_reduce(passes)
    return bool(passes > 0)


def await_others(model: nn.Module) -> None:
    """Gather weights for the others' passes without gradients until none makes one; all processes call it."""
    while is_sharded(model) and _going(model, 0):
        ids = torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device)
        with torch.enable_grad(), reading(ids == 0, [""]):  # with gradients, so that it does not announce itself
            model(input_ids=ids, use_cache=False)


def _check(name: str, layer: ExpertLayer) -> None:
    """Raise if an expert needs the weight whole outside of passes: one process alone exports, and cannot gather it."""

    def refuse() -> Tensor:
        advice = "take a sparse or low-rank expert on linear layers"
        if isinstance(layer, ExpertConv1D):
            advice = "take a low-rank expert for this layer, a Conv1D"
        raise ValueError(
            f"{type(expert).__name__} needs {name} whole, and shard_base parts it; {advice}, or leave shard_base out"
        )

    expert = layer.expert
    matrix = layer.matrix
    adds = (
        isinstance(expert, InPlaceExpert) and expert.takes_transient and type(layer) in (ExpertLinear, ExpertQuantised)
    )
    changes = isinstance(expert, InPlaceExpert | Selectable) and not adds
    if changes or expert.delta_of_base or isinstance(layer, ExpertSlice):
        refuse()
    if expert.mergeable:
        with torch.no_grad():
            expert.delta(TransientWeight.of(refuse, matrix.shape, matrix.dtype, matrix.device), lambda: matrix)


def is_sharded(model: nn.Module) -> bool:
    """Return whether processes hold parts of the model's weights."""
    return isinstance(model, FSDPModule)


def reshard(model: nn.Module) -> None:
    """Let each process hold its part again after an error in a pass, without which FSDP2 lets nobody move the model."""
    if isinstance(model, FSDPModule):
        model.set_reshard_after_forward(True, recurse=False)
        model.reshard()
        model.set_reshard_after_forward(False, recurse=False)
