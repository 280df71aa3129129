"""Read PEFT adapters as deltas of their base: a plain LoRA without PEFT, and any other type by asking PEFT."""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor, nn

from modular_experts.base import Base
from modular_experts.base.structure import is_transposed
from modular_experts.deltas import LowRank
from modular_experts.interop.full_checkpoint import ImportedAdapter
from modular_experts.interop.peft.asked import ask_peft
from modular_experts.interop.peft.files import LORA_TENSORS, AdapterFiles
from modular_experts.language_model import is_classifier, layers_of
from modular_experts.text import did_you_mean


def read_peft(adapter: str | Path | AdapterFiles, base: str | Path | Base | None = None) -> ImportedAdapter:
    """Read an adapter that PEFT saved, as deltas of its base.

    A delta of a plain LoRA is `LowRank`, with its scaling in `up`, in the orientation of the base's parameter. Any
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
    head = _head_of(files, opened)
    if files.obstacle([f"{opened.structure.model.head_place}.{name}" for name in head] if head else ()):
        return ask_peft(files, opened)
    tensors = {name: tensor for name, tensor in files.tensors.items() if name.endswith(LORA_TENSORS)}
    deltas = list(_lora_deltas(files, opened, tensors))
    return ImportedAdapter(deltas, "LORA", files.settings(), head)


def _head_of(files: AdapterFiles, base: Base) -> dict[str, Tensor]:
    """Return weight and bias of the last layer of a classifier, by their names in it, if PEFT saved it."""
    model = base.structure.model
    if not is_classifier(model) or "modules_to_save" not in files.config:
        return {}
    place = f"{model.head_place}."
    return {name.removeprefix(place): of for name, of in files.tensors.items() if name.startswith(place)}


def _lora_deltas(files: AdapterFiles, base: Base, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, LowRank]]:
    structure = base.structure
    endings = rf"\.({'|'.join(map(re.escape, LORA_TENSORS))})$"
    names = sorted({re.sub(endings, "", key) for key in tensors})
    layers = layers_of(names, structure.model)
    if strangers := [name for name, layer in layers.items() if layer is None]:
        modules = {name for name, _ in structure.model.named_modules()} - {""}
        shown = ", ".join(strangers[:4]) + (f" and {len(strangers) - 4} more" if len(strangers) > 4 else "")
        raise ValueError(
            f"{files.file} holds tensors that belong to nothing in {structure.architecture}: "
            f"{shown}{did_you_mean(strangers[0], modules)}"
        )
    for name, layer in layers.items():
        assert layer is not None
        module = structure.model.get_submodule(layer)
        if not (isinstance(module, nn.Linear | nn.Embedding) or is_transposed(module)):
            kind = type(module).__name__
            raise _does_not_fit(files, f"{name} is a {kind}; only a Linear, Conv1D or Embedding can have a LoRA")
        structure.check_untied(f"{layer}.weight", str(files.directory))
        rank, scaling = _rank_and_scaling(files, name)
        # An embedding and a `Conv1D` store the factors transposed.
        transposed = not isinstance(module, nn.Linear)
        rows, columns = tuple(module.get_parameter("weight").shape)[:: -1 if transposed else 1]
        key = f"{name}.lora_embedding_%s" if isinstance(module, nn.Embedding) else f"{name}.lora_%s.weight"
        for factor, wanted in ((key % "A", (rank, columns)), (key % "B", (rows, rank))):
            if factor not in tensors:
                raise _does_not_fit(files, f"it has no {factor}")
            if (shape := tuple(tensors[factor].shape)) != wanted:
                raise _does_not_fit(files, f"{factor} has shape {shape} and should have {wanted}")
        up = tensors[key % "B"]
        down = tensors[key % "A"]
        left, right = (down.T, up.T) if transposed else (up, down)
        yield f"{layer}.weight", LowRank((left.double() * scaling).float().contiguous(), right.float().contiguous())


def _rank_and_scaling(files: AdapterFiles, module: str) -> tuple[int, float]:
    config = files.config
    values = []
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


def _does_not_fit(files: AdapterFiles, reason: str) -> ValueError:
    return ValueError(f"{files.file} does not fit its configuration or its base: {reason}")
