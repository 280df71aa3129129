"""LoRA adapters: the product of two factors, with what `use_dora` and `lora_bias` add, as parts of a delta.

LoRA: Hu et al. 2021. DoRA: Liu et al. 2024, exact here, because the base is at hand whose lengths it changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modular_experts.deltas import Dense, LowRank
from modular_experts.interop.peft.layers import is_embedding, is_linear, is_transposed
from modular_experts.interop.peft.parts import Part, Read, check_tensors
from modular_experts.interop.peft.scaling import rank_and_scaling

__all__ = ["LORA_TENSORS", "BiasStep", "Normed", "Product", "lora_parts"]

LORA_TENSORS = (
    *("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector"),
    *("lora_embedding_A", "lora_embedding_B"),
)


@dataclass(frozen=True)
class Product(Part):
    """A product of two factors times a number: `(rows, rank)` and `(rank, columns)` of the base's parameter.

    Args:
        left: Key of the left factor.
        right: Key of the right factor.
        scaling: The number; it goes into the left factor.
        turned: Whether both factors are stored transposed: those of an embedding and of a `Conv1D`.
    """

    left: str
    right: str
    scaling: float
    turned: bool

    def delta(self, read: Read, base: Callable[[], Tensor]) -> LowRank:
        left, right = read(self.left).double(), read(self.right).float()
        if self.turned:
            left, right = left.T, right.T
        return LowRank((left * self.scaling).float().contiguous(), right.contiguous())


@dataclass(frozen=True)
class Normed(Part):
    """Base plus product, each output of it brought to a trained length.

    Args:
        product: The product.
        magnitude: Key of the lengths.
        axis: Axis of the parameter along which a length is measured.
        start: Key of a tensor that takes the base's place, if the adapter has one.
    """

    product: Product
    magnitude: str
    axis: int
    start: str | None

    def delta(self, read: Read, base: Callable[[], Tensor]) -> Dense:
        origin = base().double()
        product = self.product.delta(read, base).to(dtype=torch.float64)
        moved = product.add_to((read(self.start) if self.start else origin).double().clone())
        lengths = moved.norm(dim=self.axis, keepdim=True)
        return Dense((read(self.magnitude).double().view_as(lengths) * moved / lengths - origin).float())


@dataclass(frozen=True)
class BiasStep(Part):
    """A bias that is added to the base's, times the number of the product.

    Args:
        key: Key of the bias.
        scaling: The number.
    """

    key: str
    scaling: float

    def delta(self, read: Read, base: Callable[[], Tensor]) -> Dense:
        return Dense((read(self.key).double() * self.scaling).float())


def lora_parts(
    config: Mapping[str, Any], name: str, module: nn.Module, found: Mapping[str, torch.Size], start: str | None
) -> dict[str, Part]:
    """Return what the LoRA of one module does to the module's `weight` and `bias`.

    Args:
        config: The adapter's configuration.
        name: Full name of the module.
        module: The module, for its kind and its shapes.
        found: Shape of each tensor of the LoRA by the last part of its key.
        start: Key of a tensor that takes the place of the base's weight, if there is one.

    Raises:
        ValueError: The module is of a kind that has no LoRA here, or its tensors do not fit it.
    """
    if not (is_linear(module) or is_transposed(module) or is_embedding(module)):
        raise ValueError(f"{name} is a {type(module).__name__}; only Linear, Conv1D and Embedding can have a LoRA here")
    rank, scaling = rank_and_scaling(config, name)
    turned = not is_linear(module)
    shape = tuple(module.weight.shape)  # type: ignore[arg-type]
    rows, columns = shape[::-1] if turned else shape
    right, left = ("lora_embedding_A", "lora_embedding_B") if is_embedding(module) else LORA_TENSORS[:2]
    wanted: dict[str, tuple[int, ...]] = {left: (rows, rank), right: (rank, columns)}
    keys = (right, left) if turned else (left, right)
    part: Part = Product(f"{name}.{keys[0]}", f"{name}.{keys[1]}", scaling, turned)
    parts = {"weight": part}
    if config.get("use_dora"):
        wanted["lora_magnitude_vector"] = (rows,)
        parts["weight"] = Normed(part, f"{name}.lora_magnitude_vector", 0 if turned else 1, start)  # type: ignore[arg-type]
    if config.get("lora_bias"):
        wanted["lora_B.bias"] = (rows,)
        parts["bias"] = _bias_step(config, name, module, scaling)
    check_tensors(name, found, wanted)
    return parts


def _bias_step(config: Mapping[str, Any], name: str, module: nn.Module, scaling: float) -> BiasStep:
    if config.get("use_dora"):
        raise ValueError(f"{name} has lora_bias and use_dora, whose lengths then depend on the bias; that is not read")
    if getattr(module, "bias", None) is None:
        raise ValueError(f"{name} has a lora_bias, and the base has no bias there that could take it")
    return BiasStep(f"{name}.lora_B.bias", scaling)
