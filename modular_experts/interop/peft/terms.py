"""Turn the tensors of an adapted module into terms: the delta of a weight is the sum of its terms.

Adapters store a linear weight as `(out, in)`. So does `nn.Linear`; GPT-2's `Conv1D` stores it transposed, and an
embedding has a row for each token. A term has the shape of the base's own parameter.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modular_experts.base.structure import is_transposed
from modular_experts.deltas import Delta, Dense, LowRank, Sparse
from modular_experts.deltas.tiles import index_dtype

Read = Callable[[str], Tensor]
Terms = dict[str, list["Term"]]
Shapes = dict[str, tuple[int, ...]]

TENSORS = {
    "LORA": (
        *("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector"),
        *("lora_embedding_A", "lora_embedding_B"),
    ),
    "SHIRA": ("shira_weight", "shira_indices"),
    "SUPERTUNING": (
        *("supertuning_values", "supertuning_indices"),
        *("supertuning_lora_A.weight", "supertuning_lora_B.weight"),
    ),
}
"""The last parts of the keys that an adapter of each kind stores for a module."""


class Term(ABC):
    """One summand of the delta of one weight; its fields name tensors of the adapter by their keys."""

    @abstractmethod
    def delta(self, read: Read, base: Callable[[], Tensor]) -> Delta:
        """Return the summand; `read` returns a tensor of the adapter by its key, `base` the weight of the base."""


@dataclass(frozen=True)
class Replacement(Term):
    """A whole tensor that takes the place of the base's: of `modules_to_save`, a trained bias, a saved embedding."""

    key: str

    def delta(self, read: Read, base: Callable[[], Tensor]) -> Dense:
        return Dense((read(self.key).double() - base().double()).float())


@dataclass(frozen=True)
class Product(Term):
    """A product of two factors, `(rows, rank)` and `(rank, columns)` of the base's parameter, times `scaling`.

    The factors of an embedding and of a `Conv1D` are stored `transposed`.
    """

    left: str
    right: str
    scaling: float
    transposed: bool

    def delta(self, read: Read, base: Callable[[], Tensor]) -> LowRank:
        left, right = read(self.left).double(), read(self.right).float()
        if self.transposed:
            left, right = left.T, right.T
        return LowRank((left * self.scaling).float().contiguous(), right.contiguous())


@dataclass(frozen=True)
class NormedProduct(Term):
    """Base plus product, with each output scaled to a trained length along `axis` (DoRA).

    A tensor `replacement` takes the base's place if the adapter has one.
    """

    product: Product
    magnitude: str
    axis: int
    replacement: str | None

    def delta(self, read: Read, base: Callable[[], Tensor]) -> Dense:
        origin = base().double()
        product = self.product.delta(read, base).to(dtype=torch.float64)
        moved = product.add_to((read(self.replacement) if self.replacement else origin).double().clone())
        lengths = moved.norm(dim=self.axis, keepdim=True)
        return Dense((read(self.magnitude).double().view_as(lengths) * moved / lengths - origin).float())


@dataclass(frozen=True)
class BiasTerm(Term):
    """A bias that is added to the base's, times the scaling of the product beside it."""

    key: str
    scaling: float

    def delta(self, read: Read, base: Callable[[], Tensor]) -> Dense:
        return Dense((read(self.key).double() * self.scaling).float())


@dataclass(frozen=True)
class SparseTerm(Term):
    """Values `(n,)` at flat indices `(n,)`, or at rows and columns `(2, n)`; values at the same entry add up."""

    values: str
    indices: str
    shape: torch.Size

    def delta(self, read: Read, base: Callable[[], Tensor]) -> Sparse:
        stored = read(self.indices)
        indices = stored.to(torch.int64)
        if not torch.equal(indices.to(stored.dtype), stored):  # on Windows PEFT stores SHiRA's as floating point
            raise ValueError("its indices are not whole numbers")
        limits = torch.tensor(self.shape).view(2, 1) if indices.ndim == 2 else torch.tensor(self.shape.numel())
        if bool(((indices < 0) | (indices >= limits)).any()):
            raise ValueError(f"an entry lies outside of the weight of shape {tuple(self.shape)}")
        flat = indices[0] * self.shape[1] + indices[1] if indices.ndim == 2 else indices
        unique, position = torch.unique(flat, return_inverse=True)
        summed = torch.zeros(unique.numel(), dtype=torch.float64).index_add_(0, position, read(self.values).double())
        return Sparse(unique.to(index_dtype(self.shape)), summed.float(), self.shape)


def module_terms(
    config: Mapping[str, Any],
    name: str,
    module: nn.Module,
    found: Mapping[str, torch.Size],
    replacement: str | None,
) -> Terms:
    """Return the terms of one module's `weight` and `bias`, once its tensors are known to fit it.

    `found` holds the shapes of its adapter tensors by the last parts of their keys (see `TENSORS`); `replacement` is
    the key of a tensor that takes the place of the base's weight.

    Raises:
        ValueError: The module cannot have such an adapter, or a tensor is missing, superfluous or of another shape.
    """
    if config["peft_type"] == "LORA":
        terms, wanted = _lora_terms(config, name, module, replacement)
    else:
        terms, wanted = _sparse_terms(config, name, module, found)
    for suffix in sorted(wanted.keys() | found.keys()):
        if suffix not in found:
            raise ValueError(f"{name} has no {suffix}")
        if suffix not in wanted:
            raise ValueError(f"{name} has a {suffix}, which its configuration does not call for")
        if tuple(found[suffix]) != wanted[suffix]:
            raise ValueError(f"{name}.{suffix} has shape {tuple(found[suffix])} and should have {wanted[suffix]}")
    return terms


def _lora_terms(
    config: Mapping[str, Any], name: str, module: nn.Module, replacement: str | None
) -> tuple[Terms, Shapes]:
    """Return what a LoRA does to a module, and the shape that each of its tensors should have."""
    if not (isinstance(module, nn.Linear | nn.Embedding) or is_transposed(module)):
        raise ValueError(f"{name} is a {type(module).__name__}; only a Linear, Conv1D or Embedding can have a LoRA")
    rank, scaling = _rank_and_scaling(config, name)
    transposed = not isinstance(module, nn.Linear)
    shape = tuple(module.weight.shape)  # type: ignore[arg-type]
    rows, columns = shape[::-1] if transposed else shape
    prefix, suffix = ("lora_embedding_", "") if isinstance(module, nn.Embedding) else ("lora_", ".weight")
    wanted: Shapes = {f"{prefix}A{suffix}": (rank, columns), f"{prefix}B{suffix}": (rows, rank)}
    left, right = (f"{name}.{prefix}{factor}{suffix}" for factor in ("AB" if transposed else "BA"))
    product = Product(left, right, scaling, transposed)
    terms: Terms = {"weight": [product]}
    if config.get("use_dora"):
        wanted["lora_magnitude_vector"] = (rows,)
        magnitude = f"{name}.lora_magnitude_vector"
        terms["weight"] = [NormedProduct(product, magnitude, 0 if transposed else 1, replacement)]
    if config.get("lora_bias"):
        if config.get("use_dora"):
            raise ValueError(f"{name} has lora_bias and use_dora, which cannot be imported together")
        if getattr(module, "bias", None) is None:
            raise ValueError(f"{name} has a lora_bias, and the base has no bias there that could take it")
        wanted["lora_B.bias"] = (rows,)
        terms["bias"] = [BiasTerm(f"{name}.lora_B.bias", scaling)]
    return terms, wanted


def _sparse_terms(
    config: Mapping[str, Any], name: str, module: nn.Module, found: Mapping[str, torch.Size]
) -> tuple[Terms, Shapes]:
    """Return what SHiRA or Super-Tuning does to a module, and the shape that each of its tensors should have."""
    if not isinstance(module, nn.Linear):
        raise ValueError(f"{name} is a {type(module).__name__}; a sparse adapter can only move the weight of a Linear")
    shape: torch.Size = module.weight.shape
    values, indices = TENSORS[config["peft_type"]][:2]
    entries = found.get(values, torch.Size([0])).numel()
    terms: list[Term] = [SparseTerm(f"{name}.{values}", f"{name}.{indices}", shape)]
    if config["peft_type"] == "SHIRA":
        return {"weight": terms}, {values: (entries,), indices: (2, entries)}
    if indices not in found:
        raise ValueError(f"{name} has no {indices}; save the adapter with save_precomputed_indices=True")
    wanted: Shapes = {values: (entries,), indices: (entries,)}
    if config.get("r"):  # a LoRA beside the entries, with defaults of its own
        alpha = config.get("lora_alpha") or 2 * config["r"]
        rank, scaling = _rank_and_scaling({"r": config["r"], "lora_alpha": alpha}, name)
        right, left = TENSORS["SUPERTUNING"][2:]
        wanted |= {right: (rank, shape[1]), left: (shape[0], rank)}
        terms.append(Product(f"{name}.{left}", f"{name}.{right}", scaling, transposed=False))
    return {"weight": terms}, wanted


def _rank_and_scaling(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Return rank and scaling of a module's product; the first pattern that matches its full name decides."""
    values = []
    try:
        # The defaults of 8 are PEFT's own.
        for patterns, default in (("rank_pattern", config.get("r", 8)), ("alpha_pattern", config.get("lora_alpha", 8))):
            table = config.get(patterns) or {}
            matching = (value for pattern, value in table.items() if re.match(rf"(.*\.)?({pattern})$", module))
            values.append(next(matching, default))
        rank, alpha = values
        return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (AttributeError, TypeError, ValueError, ZeroDivisionError, re.error) as error:
        raise ValueError(f"{module} has no valid rank and alpha in adapter_config.json: {error}") from error
