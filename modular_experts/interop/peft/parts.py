"""Parts: what the tensors of an adapter do to one weight of the base; its delta is the sum of the parts."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modular_experts.base.structure import is_embedding, is_linear, is_transposed
from modular_experts.deltas import Delta, Dense, LowRank, Sparse
from modular_experts.deltas.tiles import index_dtype

__all__ = [
    "LORA_TENSORS",
    "SHIRA_TENSORS",
    "SUPERTUNING_TENSORS",
    "BiasStep",
    "Entries",
    "Normed",
    "Part",
    "Product",
    "Read",
    "Replaced",
    "check_tensors",
    "lora_parts",
    "rank_and_scaling",
    "shira_parts",
    "supertuning_parts",
]

Read = Callable[[str], Tensor]


class Part(ABC):
    """One summand of the delta of one weight."""

    @abstractmethod
    def delta(self, read: Read, base: Callable[[], Tensor]) -> Delta:
        """Return the summand.

        Args:
            read: Gives a tensor of the adapter by its key.
            base: Gives the weight of the base.

        Raises:
            ValueError: The tensors do not hold what they should.
        """


@dataclass(frozen=True)
class Replaced(Part):
    """A whole tensor in the place of the base's: of `modules_to_save`, a trained bias, a saved embedding.

    Args:
        key: Key of the tensor.
    """

    key: str

    def delta(self, read: Read, base: Callable[[], Tensor]) -> Dense:
        return Dense((read(self.key).double() - base().double()).float())


def check_tensors(module: str, found: Mapping[str, torch.Size], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a module whose tensors are not those that the configuration and the base call for.

    Args:
        module: Full name of the module.
        found: Shape of each tensor by the last part of its key.
        wanted: What they should be.

    Raises:
        ValueError: A tensor is missing, of another shape, or not called for.
    """
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            raise ValueError(f"{module} has no {name}")
        if name not in wanted:
            raise ValueError(f"{module} has a {name}, which its configuration does not call for")
        if tuple(found[name]) != wanted[name]:
            raise ValueError(f"{module}.{name} has shape {tuple(found[name])} and should have {wanted[name]}")


def rank_and_scaling(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Return rank and factor of a module.

    Args:
        config: The adapter's configuration.
        module: Full name of the module.

    Raises:
        ValueError: A number is none, or a pattern is no regular expression.
    """
    rank = _first(config.get("rank_pattern"), module, config.get("r", 8))  # PEFT's own defaults
    alpha = _first(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"the rank of {module} must be a whole number above 0, got {rank!r}")
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ValueError(f"lora_alpha of {module} must be a number, got {alpha!r}")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _first(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    if not isinstance(patterns or {}, Mapping):
        raise ValueError(f"rank_pattern and alpha_pattern must be tables of names and numbers, got {patterns!r}")
    for pattern, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise ValueError(f"the pattern {pattern!r} is no regular expression ({error})") from error
    return default


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


SHIRA_TENSORS = ("shira_weight", "shira_indices")
SUPERTUNING_TENSORS = (
    *("supertuning_values", "supertuning_indices"),
    *("supertuning_lora_A.weight", "supertuning_lora_B.weight"),
)


@dataclass(frozen=True)
class Entries(Part):
    """Values at places, which are flat indices `(n,)`, or rows and columns `(2, n)`.

    Args:
        values: Key of the values `(n,)`.
        places: Key of the places.
        shape: Shape of the weight, `(out, in)`.
        drop_zeros: Whether places whose value is zero are left out.
    """

    values: str
    places: str
    shape: torch.Size
    drop_zeros: bool

    def delta(self, read: Read, base: Callable[[], Tensor]) -> Sparse:
        places = _whole(read(self.places))
        limits = torch.tensor(self.shape).view(2, 1) if places.ndim == 2 else torch.tensor(self.shape.numel())
        if bool(((places < 0) | (places >= limits)).any()):
            raise ValueError(f"an entry lies outside of the weight of shape {tuple(self.shape)}")
        flat = places[0] * self.shape[1] + places[1] if places.ndim == 2 else places
        indices, place = torch.unique(flat, return_inverse=True)
        summed = torch.zeros(indices.numel(), dtype=torch.float64).index_add_(0, place, read(self.values).double())
        kept = summed != 0 if self.drop_zeros else torch.ones_like(summed, dtype=torch.bool)
        return Sparse(indices[kept].to(index_dtype(self.shape)), summed[kept].float(), self.shape)


def shira_parts(name: str, module: nn.Module, found: Mapping[str, torch.Size], drop_zeros: bool) -> list[Part]:
    """Return what SHiRA does to the weight of one module.

    Args:
        name: Full name of the module.
        module: The module, for its kind and shape.
        found: Shape of each of its tensors by the last part of its key.
        drop_zeros: Whether places whose value is zero are left out.

    Raises:
        ValueError: The module is not linear, or its tensors do not fit.
    """
    shape = _linear_shape(name, module)
    entries = found.get("shira_weight", torch.Size([0])).numel()
    check_tensors(name, found, {"shira_weight": (entries,), "shira_indices": (2, entries)})
    return [Entries(f"{name}.shira_weight", f"{name}.shira_indices", shape, drop_zeros)]


def supertuning_parts(
    config: Mapping[str, Any], name: str, module: nn.Module, found: Mapping[str, torch.Size], drop_zeros: bool
) -> list[Part]:
    """Return what Super-Tuning does to the weight of one module: its entries, and the LoRA beside them if it has one.

    Args:
        config: The adapter's configuration.
        name: Full name of the module.
        module: The module, for its kind and shape.
        found: Shape of each of its tensors by the last part of its key.
        drop_zeros: Whether places whose value is zero are left out.

    Raises:
        ValueError: The module is not linear, its tensors do not fit, or the places were not saved.
    """
    shape = _linear_shape(name, module)
    if "supertuning_indices" not in found:
        raise ValueError(f"{name} has no supertuning_indices; save the adapter with save_precomputed_indices=True")
    entries = found.get("supertuning_values", torch.Size([0])).numel()
    wanted: dict[str, tuple[int, ...]] = {"supertuning_values": (entries,), "supertuning_indices": (entries,)}
    parts: list[Part] = [Entries(f"{name}.supertuning_values", f"{name}.supertuning_indices", shape, drop_zeros)]
    if config.get("r"):
        alpha = config.get("lora_alpha") or 2 * config["r"]
        rank, scaling = rank_and_scaling({"r": config["r"], "lora_alpha": alpha}, name)
        wanted |= {"supertuning_lora_A.weight": (rank, shape[1]), "supertuning_lora_B.weight": (shape[0], rank)}
        left, right = f"{name}.supertuning_lora_B.weight", f"{name}.supertuning_lora_A.weight"
        parts.append(Product(left, right, scaling, turned=False))
    check_tensors(name, found, wanted)
    return parts


def _linear_shape(name: str, module: nn.Module) -> torch.Size:
    if not is_linear(module):
        raise ValueError(f"{name} is a {type(module).__name__}; a sparse adapter can move the weight of a Linear only")
    return module.weight.shape  # type: ignore[return-value]


def _whole(places: Tensor) -> Tensor:
    """Return indices as int64; on Windows PEFT stores SHiRA's as floating-point numbers."""
    whole = places.to(torch.int64)
    if not torch.equal(whole.to(places.dtype), places):
        raise ValueError("its indices are no whole numbers")
    return whole
