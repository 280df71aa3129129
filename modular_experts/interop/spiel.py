"""Read SpIEL adapters: sparse fine-tunings of linear layers, `values` at flat row-major `indices` under `sft_delta`.

The directory looks like a PEFT adapter's, with `peft_type: SFT`, which no release of PEFT knows. Source: Ansell et al.
2024, "Scaling Sparse Fine-Tuning to Large Language Models", and the files that its fork of PEFT writes.
"""

from __future__ import annotations

from pathlib import Path

import torch

from modular_experts.base import Base
from modular_experts.deltas import Delta, Sparse
from modular_experts.deltas.tiles import index_dtype
from modular_experts.interop.adapter import ImportedAdapter
from modular_experts.interop.peft.files import AdapterFiles

PEFT_TYPE = "SFT"
_SETTINGS = ("density", "num_tunable_weights", "selection_algorithm", "reselection_steps")
_SUFFIX = ".sft_delta."


def read_spiel(adapter: str | Path | AdapterFiles, base: str | Path | Base) -> ImportedAdapter:
    """Read an adapter of SpIEL, from its directory or its opened files.

    Raises:
        ValueError: A file is damaged, holds something else beside the sparse deltas, or does not fit the base.
    """
    files = adapter if isinstance(adapter, AdapterFiles) else AdapterFiles(adapter)
    structure, source = Base.open(base).structure, f"the adapter in {files.directory}"
    strangers = [key for key in files.shapes if not key.endswith((f"{_SUFFIX}values", f"{_SUFFIX}indices"))]
    if strangers:
        raise ValueError(f"{source} holds {strangers[0]}, which is not a sparse delta and cannot be imported")
    deltas: list[tuple[str, Delta]] = []
    for module in sorted({key.partition(_SUFFIX)[0] for key in files.shapes}):
        name = f"{module}.weight"
        structure.check(name, structure.shapes.get(name, torch.Size()), source)
        structure.check_untied(name, source)
        shape = structure.shapes[name]
        keys = [f"{module}{_SUFFIX}{part}" for part in ("values", "indices")]
        if len({files.shapes.get(key) for key in keys}) > 1 or len(files.shapes[keys[0]]) != 1:
            raise ValueError(f"{source} is damaged: {module} does not have one value for each index")
        values, stored = (files.read(key) for key in keys)
        indices, order = stored.sort()
        inside = not indices.numel() or 0 <= int(indices[0]) <= int(indices[-1]) < shape.numel()
        if indices.is_floating_point() or not inside or (indices[1:] == indices[:-1]).any():
            raise ValueError(
                f"{source} does not fit {structure.place}: the indices of {module} are doubled, or outside of its "
                f"shape {tuple(shape)}"
            )
        deltas.append((name, Sparse(indices.to(index_dtype(shape)), values[order].float(), shape)))
    settings = {name: files.config[name] for name in _SETTINGS if files.config.get(name) is not None}
    return ImportedAdapter(deltas, "SpIEL", files.base, files.revision, settings)
