"""SpIEL: sparse fine-tunings of linear layers, `values` at flat row-major `indices` under the prefix `sft_delta`.

The directory looks like a PEFT adapter's, with `peft_type: SFT`, which no release of PEFT knows. Source: Ansell et al.
2024, "Scaling Sparse Fine-Tuning to Large Language Models", and the files that its fork of PEFT writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from modular_experts.base import Base
from modular_experts.base.files import read_json
from modular_experts.base.structure import Structure
from modular_experts.deltas import Delta, Sparse
from modular_experts.deltas.tiles import index_dtype
from modular_experts.interop.adapter import ForeignExpert
from modular_experts.interop.peft.files import AdapterTensors

__all__ = ["is_spiel", "read_spiel"]

CONFIG_FILE = "adapter_config.json"
_SETTINGS = ("density", "num_tunable_weights", "selection_algorithm", "reselection_steps")
_SUFFIX = ".sft_delta."


def is_spiel(directory: Path) -> bool:
    """Return whether a directory with an adapter's configuration holds one of SpIEL."""
    return _config(directory).get("peft_type") == "SFT"


def read_spiel(directory: Path, base: Base) -> ForeignExpert:
    """Read an adapter of SpIEL.

    Args:
        directory: Directory with `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).
        base: The model that it was trained on.

    Raises:
        ValueError: A file is damaged, holds something else beside the sparse deltas, or does not fit the base.
    """
    config, structure, tensors = _config(directory), base.structure, AdapterTensors(directory)
    strange = sorted(key for key in tensors.shapes if not key.endswith((f"{_SUFFIX}values", f"{_SUFFIX}indices")))
    if strange:
        raise ValueError(
            f"the adapter in {directory} holds {strange[0]}, which is no sparse delta; modules that were trained "
            "as a whole beside them cannot be imported"
        )
    deltas = [
        _delta(directory, module, tensors, structure)
        for module in sorted({key.partition(_SUFFIX)[0] for key in tensors.shapes})
    ]
    settings = {name: config[name] for name in _SETTINGS if config.get(name) is not None}
    return ForeignExpert(deltas, "SpIEL", config.get("base_model_name_or_path"), config.get("revision"), settings)


def _delta(directory: Path, module: str, tensors: AdapterTensors, structure: Structure) -> tuple[str, Delta]:
    name = f"{module}.weight"
    if name not in structure.shapes:
        structure.check(name, torch.Size(), f"the adapter in {directory}")
    shape = structure.shapes[name]
    keys = [f"{module}{_SUFFIX}{what}" for what in ("values", "indices")]
    if len({tensors.shapes.get(key) for key in keys}) > 1 or len(tensors.shapes[keys[0]]) != 1:
        raise ValueError(f"the adapter in {directory} is damaged: {module} has not one value for each index")
    values, places = (tensors.read(key) for key in keys)
    indices, order = places.sort()
    inside = not indices.numel() or 0 <= int(indices[0]) <= int(indices[-1]) < shape.numel()
    if indices.is_floating_point() or not inside or (indices[1:] == indices[:-1]).any():
        raise ValueError(
            f"the adapter in {directory} does not fit {structure.place}: the indices of {module} are doubled, or "
            f"outside of its shape {tuple(shape)}"
        )
    return name, Sparse(indices.to(index_dtype(shape)), values[order].float(), shape)


def _config(directory: Path) -> dict[str, Any]:
    return read_json(directory / CONFIG_FILE, "so it is not the directory of an adapter")
