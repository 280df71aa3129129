"""Sparse adapters: SHiRA and Super-Tuning, which move single entries, as parts of a delta.

SHiRA (Bhardwaj et al. 2024) stores the row and the column of each entry, Super-Tuning (arXiv:2607.09287) its flat
index, and may have a LoRA beside. Both add up entries that are named twice. A place whose value is zero is a place all
the same - training may go on there - unless zeros are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modular_experts.blocks import index_dtype
from modular_experts.deltas import Sparse
from modular_experts.interop.peft.layers import is_linear
from modular_experts.interop.peft.lora_parts import Product
from modular_experts.interop.peft.parts import Part, Read, check_tensors
from modular_experts.interop.peft.scaling import rank_and_scaling

__all__ = ["SHIRA_TENSORS", "SUPERTUNING_TENSORS", "Entries", "shira_parts", "supertuning_parts"]

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
