"""Encode deltas as the tensors of a PEFT adapter: LoRA, SHiRA or Super-Tuning."""

import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modular_experts.base.structure import Structure, is_transposed, sliced, split_slice
from modular_experts.deltas import BlockSparse, Delta, Dense, LowRank, Sparse
from modular_experts.deltas.algebra import truncated_svd
from modular_experts.deltas.tiles import rows_and_columns
from modular_experts.interop.full_checkpoint import lossless
from modular_experts.library import StoredExpert
from modular_experts.library.record import Record


@dataclass(frozen=True)
class EncodedWeight:
    """One weight as an adapter stores it: the delta that this stands for, and tensors by the last parts of their keys.

    `energy` and `lost` are squared Frobenius norms of the expert's delta and of the part that the adapter lacks;
    `padding` counts entries that the format requires and the expert does not have.
    """

    delta: Delta
    tensors: Mapping[str, Tensor]
    energy: float
    lost: float = 0.0
    padding: int = 0

    @property
    def relative_error(self) -> float:
        """Frobenius norm of the lost part, as a share of the norm of the delta."""
        return math.sqrt(self.lost / self.energy) if self.energy else 0.0


class PeftFormat(ABC):
    """A kind of PEFT adapter that an expert can be written as.

    Attributes:
        peft_type: PEFT's name for it.
        modules: The modules whose weights it can move, in words.
        parameters: Which weights of a module it can move: `weight`, and for some kinds `bias`.
        moves_matrices: Whether it can move the matrices of mixture-of-experts layers, which `matrices` joins.
    """

    peft_type: ClassVar[str]
    modules: ClassVar[str]
    parameters: ClassVar[tuple[str, ...]] = ("weight",)
    moves_matrices: ClassVar[bool] = False

    @abstractmethod
    def supports(self, module: nn.Module) -> bool:
        """Return whether the format can move the weights of a module."""

    def fit_to(self, expert: StoredExpert, names: Iterable[str]) -> "PeftFormat":
        """Return the format for these weights of an expert; a ValueError means that it is not for this expert."""
        return self

    @abstractmethod
    def encode(self, name: str, module: nn.Module, delta: Delta) -> EncodedWeight:
        """Encode the delta of one weight; a ValueError means that the format cannot store it."""

    @abstractmethod
    def configuration(self, modules: Mapping[str, nn.Module], encoded: Mapping[str, EncodedWeight]) -> Record:
        """Return the fields of `adapter_config.json` that belong to this format alone."""


@dataclass(frozen=True)
class LoraFormat(PeftFormat):
    """A LoRA adapter, whose factors multiply to the delta: `lora_alpha` is the rank, so PEFT scales by one.

    Args:
        rank: Largest rank, to which any other delta is approximated; without it only low-rank deltas can be written.
        steps: The ranks that a server takes, in ascending order. Then all weights have one of them, filled up with
            zeros: the first that holds all deltas whole, if they are of low rank, else the first that keeps enough.
        keep: The least share of the expert's squared Frobenius norm that is enough, from 0 to 1.
    """

    rank: int | None = None
    steps: Sequence[int] = ()
    keep: float = 0.7

    peft_type = "LORA"
    modules = "Linear, Conv1D and Embedding"
    moves_matrices = True

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep is a share above 0 and up to 1, got {self.keep}")

    def fit_to(self, expert: StoredExpert, names: Iterable[str]) -> "LoraFormat":
        if not self.steps:
            return self
        names = list(names)
        largest = self.steps[-1]
        held = 0
        for name in names:
            delta = expert[name]
            held = max(held, delta.rank if isinstance(delta, LowRank) else largest + 1)
        if held <= largest:
            return replace(self, rank=next(step for step in self.steps if step >= held))
        kept = torch.zeros(largest, dtype=torch.float64)
        whole = 0.0
        for name in names:
            values = expert[name].dense()
            product, _ = truncated_svd(Dense(values), largest)
            energy = product.up.double().square().sum(0) * product.down.double().square().sum(1)
            kept += F.pad(energy, (0, largest - len(energy))).cumsum(0)
            whole += float(values.double().square().sum())
        kept /= whole
        enough = self.keep - 1e-6  # all directions together miss that much by rounding
        rank = next((step for step in self.steps if kept[step - 1] >= enough), None)
        if rank is None:
            raise ValueError(
                f"at rank {largest}, the largest that the server takes, a LoRA keeps {kept[-1]:.1%} of the squared "
                f"norm of {expert.name}, less than keep={self.keep:g}; ask for less, or write a checkpoint "
                "with `apply`"
            )
        return replace(self, rank=rank)

    def supports(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear | nn.Embedding) or is_transposed(module)

    def check_forms(self, forms: Mapping[str, str]) -> None:
        """Raise if a weight, by the name of its delta's form, needs a rank and none is given."""
        for name, kind in forms.items():
            if self.rank is None and not self.steps and kind != "LowRank" and name.endswith(".weight"):
                raise ValueError(
                    f"the delta of {name} is {kind}, not a product of two factors; give a `rank=16` to approximate "
                    "it, or export a sparse expert as supertuning or shira"
                )

    def encode(self, name: str, module: nn.Module, delta: Delta) -> EncodedWeight:
        self.check_forms({name: type(delta).__name__})
        largest = delta.rank if isinstance(delta, LowRank) else min(delta.shape)
        product, lost = truncated_svd(delta, self.rank or largest)
        if self.steps and self.rank:
            more = self.rank - product.rank
            product = LowRank(F.pad(product.up, (0, more)), F.pad(product.down, (0, 0, 0, more)))
        if split_slice(name)[1] is not None:
            tensors = {}  # `matrices` joins them
        elif isinstance(module, nn.Linear):
            tensors = {"lora_A.weight": product.down, "lora_B.weight": product.up}
        elif isinstance(module, nn.Embedding):
            tensors = {"lora_embedding_A": product.up.T, "lora_embedding_B": product.down.T}
        else:
            tensors = {"lora_A.weight": product.up.T, "lora_B.weight": product.down.T}
        return EncodedWeight(product, tensors, delta.norm() ** 2, lost)

    def configuration(self, modules: Mapping[str, nn.Module], encoded: Mapping[str, EncodedWeight]) -> Record:
        every = {name.removesuffix(".weight"): weight.delta.rank for name, weight in encoded.items()}  # type: ignore[attr-defined]
        ranks = {name: rank for name, rank in every.items() if split_slice(name)[1] is None}
        joined = list(dict.fromkeys(split_slice(name)[0] for name in every if name not in ranks))
        often = max(Counter(every.values()).items(), key=lambda item: item[::-1])[0]
        usual = common_rank(encoded) if joined else often
        others = {re.escape(name): rank for name, rank in ranks.items() if rank != usual}
        return {
            "r": usual,
            "lora_alpha": usual,
            "target_parameters": joined or None,
            "rank_pattern": others,
            "alpha_pattern": others,
            "fan_in_fan_out": all(is_transposed(module) for module in modules.values()),
            "bias": "none",
            "lora_dropout": 0.0,
            "init_lora_weights": True,
            "use_rslora": False,
        }


def common_rank(encoded: Mapping[str, EncodedWeight]) -> int:
    """Return the largest rank of the matrices of mixture-of-experts layers, which PEFT gives to all of them."""
    return max(weight.delta.rank for name, weight in encoded.items() if split_slice(name)[1] is not None)  # type: ignore[attr-defined]


def matrices(encoded: Mapping[str, EncodedWeight], structure: Structure) -> dict[str, Tensor]:
    """Return the tensors of an adapter for the matrices of mixture-of-experts layers: PEFT's `target_parameters`.

    A parameter of E matrices has `lora_A` `(E rank, in)`, matrix by matrix, and `lora_B` `(out, rank E)`, rank by rank.
    In a module with several such parameters the next one wraps each.
    """
    tensors: dict[str, Tensor] = {}
    wholes = list(dict.fromkeys(split_slice(name)[0] for name in encoded if split_slice(name)[1] is not None))
    for whole in wholes:
        place, _, parameter = whole.rpartition(".")
        module = structure.layer(whole)
        rank = common_rank(encoded)
        wrapped = [key for key in sliced(module) if f"{place}.{key}" in wholes]
        wrappers = wrapped[wrapped.index(parameter) + 1 :]
        inside = "".join("base_layer." for _ in wrappers)
        count, *shape = structure.shapes[whole]
        out, size = reversed(shape) if module.is_transposed else shape
        down = torch.zeros(count, rank, size)
        up = torch.zeros(out, rank, count)
        for number in range(count):
            if (weight := encoded.get(f"{whole}[{number}]")) is not None:
                product: Any = weight.delta.T if module.is_transposed else weight.delta
                down[number, : product.rank] = product.down
                up[:, : product.rank, number] = product.up
        tensors[f"{place}.{inside}lora_A.weight"] = down.view(-1, size)
        tensors[f"{place}.{inside}lora_B.weight"] = up.reshape(out, -1)
    return tensors


class _SparseFormat(PeftFormat):
    """A format with a fixed number of `entries` for each shape, which zeros fill up."""

    modules = "Linear"

    def supports(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)

    @abstractmethod
    def entries(self, shape: torch.Size) -> int: ...

    @abstractmethod
    def tensors(self, delta: Sparse) -> dict[str, Tensor]: ...

    def encode(self, name: str, module: nn.Module, delta: Delta) -> EncodedWeight:
        sparse = _as_sparse(name, delta)
        padding = self.entries(sparse.shape) - sparse.support_size
        assert padding >= 0
        # Put the padding at unused entries, spread evenly over the weight.
        unused = torch.ones(sparse.shape.numel(), dtype=torch.bool)
        unused[sparse.indices.long()] = False
        free = unused.nonzero()[:, 0]
        chosen = free[torch.arange(padding) * free.numel() // max(padding, 1)]
        indices, order = torch.cat([sparse.indices.long(), chosen]).sort()
        values = torch.cat([sparse.values.float(), torch.zeros(padding)])[order]
        filled = Sparse(indices.to(sparse.indices.dtype), values, sparse.shape)
        return EncodedWeight(filled, self.tensors(filled), delta.norm() ** 2, padding=padding)


@dataclass(frozen=True)
class ShiraFormat(_SparseFormat):
    """A SHiRA adapter, with `r * (out + in)` entries in a weight and one `r` for all of them."""

    _r: int = 0

    peft_type = "SHIRA"

    def fit_to(self, expert: Mapping[str, Delta], names: Iterable[str]) -> "ShiraFormat":
        r = 1
        shapes: dict[str, torch.Size] = {}
        for name in names:
            delta = _as_sparse(name, expert[name])
            shapes[name] = delta.shape
            r = max(r, math.ceil(delta.support_size / sum(delta.shape)))
        for name, shape in shapes.items():
            entries = r * sum(shape)
            if entries > shape.numel():
                raise ValueError(
                    f"SHiRA would need r={r} for all modules, which is {entries} entries of {name}, and it has "
                    f"only {shape.numel()}; export it as supertuning"
                )
        return replace(self, _r=r)

    def entries(self, shape: torch.Size) -> int:
        return self._r * sum(shape)

    def tensors(self, delta: Sparse) -> dict[str, Tensor]:
        indices = torch.stack(rows_and_columns(delta.indices, delta.shape)).to(torch.int32)
        return {"shira_weight": delta.values, "shira_indices": indices}

    def configuration(self, modules: Mapping[str, nn.Module], encoded: Mapping[str, EncodedWeight]) -> Record:
        return {"r": self._r, "mask_type": "random", "fan_in_fan_out": False, "init_weights": True}


@dataclass(frozen=True)
class SupertuningFormat(_SparseFormat):
    """A Super-Tuning adapter, with one sparsity for all weights."""

    _sparsity: float = 0.0

    peft_type = "SUPERTUNING"

    def fit_to(self, expert: Mapping[str, Delta], names: Iterable[str]) -> "SupertuningFormat":
        kept = []
        for name in names:
            delta = _as_sparse(name, expert[name])
            kept.append((max(delta.support_size, 1), delta.shape))
        sparsity = 1.0 - max(entries / shape.numel() for entries, shape in kept)
        fitted = replace(self, _sparsity=sparsity)
        while any(fitted.entries(shape) < entries for entries, shape in kept):  # rounding has cost an entry
            sparsity = math.nextafter(sparsity, 0.0)
            fitted = replace(self, _sparsity=sparsity)
        return fitted

    def entries(self, shape: torch.Size) -> int:
        return int(shape.numel() * (1 - self._sparsity))  # PEFT's own arithmetic, rounding included

    def tensors(self, delta: Sparse) -> dict[str, Tensor]:
        return {"supertuning_values": delta.values, "supertuning_indices": delta.indices.to(torch.int32)}

    def configuration(self, modules: Mapping[str, nn.Module], encoded: Mapping[str, EncodedWeight]) -> Record:
        return {"sparsity": self._sparsity, "select_top": True, "init_weights": True, "save_precomputed_indices": True}


def _as_sparse(name: str, delta: Delta) -> Sparse:
    # A merge may have made a delta dense in form while few entries move.
    if isinstance(delta, BlockSparse):
        delta = delta.by_entries()
    elif isinstance(delta, Dense):
        delta = lossless(delta.values)
    if not isinstance(delta, Sparse):
        way_out = "`form=lora`"
        if not isinstance(delta, LowRank):
            way_out += " and `rank=16`, which approximates it"
        raise ValueError(
            f"the delta of {name} is {type(delta).__name__} and has no single entries to store; export it with "
            f"{way_out}"
        )
    return delta
