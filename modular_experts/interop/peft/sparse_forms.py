"""SHiRA and Super-Tuning: sparse deltas exactly, with zeros up to the number of entries that the format asks for.

Both formats give every module its number of entries by one setting for the whole adapter: SHiRA `r * (in + out)`,
Super-Tuning a share of the weight. The zeros stand at places that are not kept, spread evenly, each one once.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from modular_experts.blocks import rows_and_columns
from modular_experts.deltas import BlockSparse, Delta, Dense, Sparse
from modular_experts.interop.forms import Exact
from modular_experts.interop.peft.form import Carried, PeftForm
from modular_experts.interop.peft.layers import is_linear

__all__ = ["ShiraForm", "SupertuningForm"]


class _Entries(PeftForm):
    """What both have in common."""

    carries = "Linear"

    def takes(self, module: nn.Module) -> bool:
        return is_linear(module)

    @abstractmethod
    def entries(self, shape: torch.Size) -> int:
        """Return how many entries a weight of this shape has in the adapter."""

    @abstractmethod
    def tensors(self, delta: Sparse) -> dict[str, Tensor]:
        """Return the tensors of one module."""

    def carry(self, name: str, module: nn.Module, delta: Delta) -> Carried:
        sparse = _as_sparse(name, delta)
        filled = _filled(sparse, self.entries(sparse.shape))
        padding = filled.support_size - sparse.support_size
        return Carried(filled, self.tensors(filled), delta.norm() ** 2, padding=padding)


@dataclass(frozen=True)
class ShiraForm(_Entries):
    """A SHiRA adapter."""

    _r: int = 0

    peft_type = "SHIRA"

    def settle(self, deltas: Iterable[tuple[str, Delta]]) -> ShiraForm:
        kept = [(name, _as_sparse(name, delta).support_size, delta.shape) for name, delta in deltas]
        r = max(1, *(math.ceil(some / sum(shape)) for _, some, shape in kept))
        for name, _, shape in kept:
            if r * sum(shape) > shape.numel():
                raise ValueError(
                    f"SHiRA would need r={r} for all modules, which is {r * sum(shape)} entries of {name}, and it has "
                    f"only {shape.numel()}; export it as supertuning, or as a full checkpoint with apply"
                )
        return replace(self, _r=r)

    def entries(self, shape: torch.Size) -> int:
        return self._r * sum(shape)

    def tensors(self, delta: Sparse) -> dict[str, Tensor]:
        places = torch.stack(rows_and_columns(delta.indices, delta.shape)).to(torch.int32)
        return {"shira_weight": delta.values, "shira_indices": places}

    def configuration(self, modules: Mapping[str, nn.Module], carried: Mapping[str, Carried]) -> dict[str, Any]:
        return {"r": self._r, "mask_type": "random", "fan_in_fan_out": False, "init_weights": True}


@dataclass(frozen=True)
class SupertuningForm(_Entries):
    """A Super-Tuning adapter."""

    _sparsity: float = 0.0

    peft_type = "SUPERTUNING"

    def settle(self, deltas: Iterable[tuple[str, Delta]]) -> SupertuningForm:
        kept = [(name, max(_as_sparse(name, delta).support_size, 1), delta.shape.numel()) for name, delta in deltas]
        for name, _, size in kept:
            if size >= 2**31:
                raise ValueError(f"{name} has {size} entries, more than Super-Tuning's indices can number; use apply")
        sparsity = 1.0 - max(some / size for _, some, size in kept)
        while any(_entries_at(sparsity, size) < some for _, some, size in kept):
            sparsity = math.nextafter(sparsity, 0.0)  # rounding has cost an entry
        return replace(self, _sparsity=sparsity)

    def entries(self, shape: torch.Size) -> int:
        return _entries_at(self._sparsity, shape.numel())

    def tensors(self, delta: Sparse) -> dict[str, Tensor]:
        return {"supertuning_values": delta.values, "supertuning_indices": delta.indices.to(torch.int32)}

    def configuration(self, modules: Mapping[str, nn.Module], carried: Mapping[str, Carried]) -> dict[str, Any]:
        return {"sparsity": self._sparsity, "select_top": True, "init_weights": True, "save_precomputed_indices": True}


def _entries_at(sparsity: float, size: int) -> int:
    return int(size * (1 - sparsity))  # written as PEFT computes it, rounding included


def _as_sparse(name: str, delta: Delta) -> Sparse:
    if isinstance(delta, BlockSparse):
        delta = delta.as_sparse()
    elif isinstance(delta, Dense):
        delta = Exact().of(delta.values)  # it may be dense in form only
    if not isinstance(delta, Sparse):
        raise ValueError(
            f"the delta of {name} is {type(delta).__name__} and has no single entries to store; export it as lora, "
            "with a rank to approximate it, or as a full checkpoint with apply"
        )
    return delta


def _filled(delta: Sparse, entries: int) -> Sparse:
    """Return the delta with zeros at unused places, until it has so many entries."""
    missing = entries - delta.support_size
    assert missing >= 0
    unused = torch.ones(delta.shape.numel(), dtype=torch.bool)
    unused[delta.indices.long()] = False
    free = unused.nonzero()[:, 0]
    chosen = free[torch.arange(missing) * free.numel() // max(missing, 1)]
    indices, order = torch.cat([delta.indices.long(), chosen]).sort()
    values = torch.cat([delta.values.float(), torch.zeros(missing)])[order]
    return Sparse(indices.to(delta.indices.dtype), values, delta.shape)
