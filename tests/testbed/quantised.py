"""A quantised base, and a plain one with its dequantised weights, with which it is compared."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modular_experts.base import Base
from modular_experts.base.quantised import is_quantised, read_weight
from modular_experts.injection import inject

TOKENS = torch.tensor([[5, 9, 17, 33, 21, 8, 40, 3], [12, 4, 66, 31, 7, 50, 23, 9]])


def plain_twin(model: nn.Module) -> Any:
    """Return a copy whose quantised layers are plain ones with the dequantised weights."""
    twin = copy.deepcopy(model)
    for name, layer in list(twin.named_modules()):
        if is_quantised(layer):
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            plain.weight.data = read_weight(layer, torch.float32).read()
            if layer.bias is not None:
                plain.bias.data = layer.bias.data.clone()
            twin.set_submodule(name, plain)
    return twin


def load(place: Path, form: str = "nf4", dtype: Any = "float32") -> Any:
    return Base.open(place, quantise=form).load(dtype)


def put(model: nn.Module, kind: Callable[..., Any], modules: Any = "all-linear") -> Any:
    torch.manual_seed(1)
    inject(model, kind, modules)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def step(model: Any) -> tuple[float, dict[str, Tensor]]:
    loss = model(TOKENS, labels=TOKENS).loss
    loss.backward()
    return loss.item(), {name: one.grad for name, one in model.named_parameters() if one.requires_grad}
