"""Forms: the kinds of PEFT adapter that an expert can be written as, and what they have in common."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from modular_experts.base.structure import is_embedding, is_linear, is_transposed
from modular_experts.deltas import BlockSparse, Delta, Dense, LowRank, Sparse
from modular_experts.deltas.tiles import rows_and_columns
from modular_experts.interop.compression import Exact

__all__ = ["Carried", "LoraForm", "PeftForm", "ShiraForm", "SupertuningForm", "best_rank", "total_error"]


@dataclass(frozen=True)
class Carried:
    """How an adapter carries one weight.

    Attributes:
        delta: The delta that the adapter stands for.
        tensors: Its tensors, by the last part of their key.
        energy: Squared Frobenius norm of the expert's delta.
        lost: The same of what the adapter lacks of it.
        padding: Entries of value zero that the format asks for and the expert does not have.
    """

    delta: Delta
    tensors: Mapping[str, Tensor]
    energy: float
    lost: float = 0.0
    padding: int = 0

    @property
    def kept_energy(self) -> float:
        """Share of the energy that is carried, in [0, 1]."""
        return 1.0 - self.lost / self.energy if self.energy else 1.0

    @property
    def relative_error(self) -> float:
        """Frobenius norm of what is lost, as a share of that of the delta."""
        return math.sqrt(self.lost / self.energy) if self.energy else 0.0

    def numbers(self) -> dict[str, Any]:
        """Return what a manifest says about the weight."""
        return {
            "form": type(self.delta).__name__,
            "kept": getattr(self.delta, "rank", self.delta.support_size),
            "padding": self.padding,
            "kept_energy": self.kept_energy,
            "relative_error": self.relative_error,
        }


class PeftForm(ABC):
    """A kind of PEFT adapter.

    Attributes:
        peft_type: What PEFT calls it.
        carries: Which modules' weights it can move, in words.
    """

    peft_type: ClassVar[str]
    carries: ClassVar[str]

    @abstractmethod
    def takes(self, module: nn.Module) -> bool:
        """Return whether the weight of this module can be moved."""

    def settle(self, deltas: Iterable[tuple[str, Delta]]) -> PeftForm:
        """Return the form with what is one for all modules, such as a sparsity, chosen for these deltas.

        Raises:
            ValueError: No choice suits them all.
        """
        return self

    @abstractmethod
    def carry(self, name: str, module: nn.Module, delta: Delta) -> Carried:
        """Return a delta as the adapter carries it.

        Raises:
            ValueError: It cannot.
        """

    @abstractmethod
    def configuration(self, modules: Mapping[str, nn.Module], carried: Mapping[str, Carried]) -> dict[str, Any]:
        """Return the fields of `adapter_config.json` that are this form's own."""


def total_error(carried: Mapping[str, Carried]) -> float:
    """Return the relative error of all weights together."""
    energy = sum(weight.energy for weight in carried.values())
    return math.sqrt(sum(weight.lost for weight in carried.values()) / energy) if energy else 0.0


def best_rank(delta: Delta, rank: int) -> tuple[LowRank, float]:
    """Return the nearest delta of a rank, in float32, and the squared Frobenius norm of what is lost.

    A delta that has that rank or less as it is written is returned as it is; then nothing is lost.

    Args:
        delta: A delta `(out, in)`.
        rank: At least 1.
    """
    if isinstance(delta, LowRank) and delta.rank <= rank:
        return LowRank(delta.up.float(), delta.down.float()), 0.0
    if isinstance(delta, LowRank):
        basis, core = torch.linalg.qr(delta.up.double())
        up, down, lost = _project(core @ delta.down.double(), rank)
        return LowRank((basis @ up).float(), down.float()), lost
    matrix = delta.dense().double()
    if matrix.shape[0] <= matrix.shape[1]:
        up, down, lost = _project(matrix, rank)
    else:
        down, up, lost = _project(matrix.T, rank)
        up, down = up.T, down.T
    return LowRank(up.float().contiguous(), down.float().contiguous()), lost


def _project(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Return `(rows, rank)`, `(rank, columns)` and the squared norm of the rest; few rows are quick."""
    energies, directions = torch.linalg.eigh(matrix @ matrix.T)  # in ascending order
    kept = directions[:, -rank:].flip(1)
    return kept, kept.T @ matrix, energies[:-rank].clamp(min=0).sum().item()


@dataclass(frozen=True)
class LoraForm(PeftForm):
    """A LoRA adapter, whose factors multiply to the delta: `lora_alpha` is the rank, so nothing is scaled.

    Args:
        rank: Largest rank. A low-rank delta up to it stays exact; any other one becomes its best approximation of that
            rank. Without it only low-rank deltas are carried, of whatever rank, exactly.
    """

    rank: int | None = None

    peft_type = "LORA"
    carries = "Linear, Conv1D and Embedding"

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")

    def takes(self, module: nn.Module) -> bool:
        return is_linear(module) or is_transposed(module) or is_embedding(module)

    def carry(self, name: str, module: nn.Module, delta: Delta) -> Carried:
        if self.rank is None and not isinstance(delta, LowRank):
            raise ValueError(
                f"the delta of {name} is {type(delta).__name__} and no product of two factors; give a rank to "
                "approximate it, or export a sparse expert as supertuning or shira"
            )
        product, lost = best_rank(delta, self.rank or min(delta.shape) + max(delta.shape))
        return Carried(product, _tensors(module, product), delta.norm() ** 2, lost)

    def configuration(self, modules: Mapping[str, nn.Module], carried: Mapping[str, Carried]) -> dict[str, Any]:
        ranks = {name.removesuffix(".weight"): weight.delta.rank for name, weight in carried.items()}  # type: ignore[attr-defined]
        usual = max(Counter(ranks.values()).items(), key=lambda item: item[::-1])[0]
        others = {re.escape(name): rank for name, rank in ranks.items() if rank != usual}
        return {
            "r": usual,
            "lora_alpha": usual,
            "rank_pattern": others,
            "alpha_pattern": others,
            "fan_in_fan_out": all(is_transposed(module) for module in modules.values()),
            "bias": "none",
            "lora_dropout": 0.0,
            "init_lora_weights": True,
            "use_rslora": False,
        }


def _tensors(module: nn.Module, delta: LowRank) -> dict[str, Tensor]:
    if is_linear(module):
        return {"lora_A.weight": delta.down, "lora_B.weight": delta.up}
    if is_embedding(module):
        return {"lora_embedding_A": delta.up.T, "lora_embedding_B": delta.down.T}
    return {"lora_A.weight": delta.up.T, "lora_B.weight": delta.down.T}


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
