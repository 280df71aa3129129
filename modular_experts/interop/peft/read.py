"""Read PEFT adapters as deltas of their base: a plain LoRA by itself, without PEFT, and any other type by asking PEFT.

A plain LoRA is two factors for each weight of a linear layer, a `Conv1D` or an embedding, with rsLoRA and with patterns
of ranks and alphas. The tensors show which modules it moves.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from torch import nn

from modular_experts.base import Base
from modular_experts.base.structure import is_transposed
from modular_experts.deltas import Delta, LowRank
from modular_experts.interop.adapter import ImportedAdapter
from modular_experts.interop.peft.asked import ask_peft
from modular_experts.interop.peft.files import LORA_TENSORS, AdapterFiles
from modular_experts.text import did_you_mean


def read_peft(adapter: str | Path | AdapterFiles, base: str | Path | Base | None = None) -> ImportedAdapter:
    """Read an adapter that PEFT saved, as deltas of its base.

    For a plain LoRA, the call checks names, shapes and settings, and an iteration over the deltas reads numbers, one
    weight at a time: each delta is `LowRank`, with its scaling in `up`, in the orientation of the base's parameter. Any
    other adapter is read with PEFT, as `ask_peft` explains.

    Args:
        adapter: The adapter's directory.
        base: The base's directory or hub id; the one that the adapter's configuration names if not given.

    Raises:
        FileNotFoundError: A file of the adapter, or the base, is missing.
        ValueError: A file is damaged, no deltas of this base can express the adapter, or it is not a plain LoRA, and
            PEFT refuses it or is not installed.
    """
    files = adapter if isinstance(adapter, AdapterFiles) else AdapterFiles(adapter)
    opened = Base.open(base or files.base, revision=None if base else files.revision)
    if files.obstacle():
        return ask_peft(files, opened)
    return ImportedAdapter(_LoraDeltas(files, opened), "LORA", files.base, files.revision, files.settings())


class _Product(NamedTuple):
    """The factors of one delta by their keys, `(rows, rank)` and `(rank, columns)` of the base's parameter, and the
    scaling; an embedding and a `Conv1D` store them transposed.
    """

    left: str
    right: str
    scaling: float
    transposed: bool


class _LoraDeltas(Iterable[tuple[str, Delta]]):
    """The deltas of a plain LoRA; every iteration reads its numbers anew."""

    def __init__(self, files: AdapterFiles, base: Base) -> None:
        self._files, structure = files, base.structure
        suffixes = {key: next(suffix for suffix in LORA_TENSORS if key.endswith(f".{suffix}")) for key in files.shapes}
        names = sorted({key.removesuffix(f".{suffix}") for key, suffix in suffixes.items()})
        modules = {name for name, _ in structure.model.named_modules()} - {""}
        if strangers := [name for name in names if name not in modules]:
            shown = ", ".join(strangers[:4]) + (f" and {len(strangers) - 4} more" if len(strangers) > 4 else "")
            raise ValueError(
                f"{files.file} holds tensors that belong to nothing in {structure.architecture}: "
                f"{shown}{did_you_mean(strangers[0], modules)}"
            )
        self._products = {f"{name}.weight": self._product(name, structure.model.get_submodule(name)) for name in names}
        for name in self._products:
            structure.check_untied(name, str(files.directory))

    def __iter__(self) -> Iterator[tuple[str, Delta]]:
        for name, (left_key, right_key, scaling, transposed) in self._products.items():
            left, right = self._files.read(left_key).double(), self._files.read(right_key).float()
            if transposed:
                left, right = left.T, right.T
            yield name, LowRank((left * scaling).float().contiguous(), right.contiguous())

    def _product(self, name: str, module: nn.Module) -> _Product:
        """Return the product of a module's factors, once they are known to fit its weight and the configuration."""
        if not (isinstance(module, nn.Linear | nn.Embedding) or is_transposed(module)):
            kind = type(module).__name__
            raise self._does_not_fit(f"{name} is a {kind}; only a Linear, Conv1D or Embedding can have a LoRA")
        rank, scaling = self._rank_and_scaling(name)
        transposed = not isinstance(module, nn.Linear)
        shape = tuple(module.weight.shape)  # type: ignore[arg-type]
        rows, columns = shape[::-1] if transposed else shape
        prefix, suffix = ("lora_embedding_", "") if isinstance(module, nn.Embedding) else ("lora_", ".weight")
        for factor, wanted in (("A", (rank, columns)), ("B", (rows, rank))):
            key = f"{name}.{prefix}{factor}{suffix}"
            if key not in self._files.shapes:
                raise self._does_not_fit(f"{name} has no {prefix}{factor}{suffix}")
            found = tuple(self._files.shapes[key])
            if found != wanted:
                raise self._does_not_fit(f"{key} has shape {found} and should have {wanted}")
        left, right = (f"{name}.{prefix}{factor}{suffix}" for factor in ("AB" if transposed else "BA"))
        return _Product(left, right, scaling, transposed)

    def _rank_and_scaling(self, module: str) -> tuple[int, float]:
        """Return rank and scaling of a module's product; the first pattern that matches its full name decides."""
        config, values = self._files.config, []
        try:
            # The defaults of 8 are PEFT's own.
            for patterns, setting in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
                table = config.get(patterns) or {}
                matching = (value for pattern, value in table.items() if re.match(rf"(.*\.)?({pattern})$", module))
                values.append(next(matching, config.get(setting, 8)))
            rank, alpha = values
            return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        except (AttributeError, TypeError, ValueError, ZeroDivisionError, re.error) as error:
            raise ValueError(f"{module} has no valid rank and alpha in adapter_config.json: {error}") from error

    def _does_not_fit(self, reason: str) -> ValueError:
        return ValueError(f"{self._files.file} does not fit its configuration or its base: {reason}")
