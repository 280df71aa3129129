"""Adapter configurations: what `adapter_config.json` says, and which of it changes the mathematics.

Every field is either known to leave the result alone, understood by the reader of its kind, or refused: nothing that
could change a weight is passed over. Field names and defaults are those of peft 0.21.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modular_experts.base.files import open_tensors, read_json
from modular_experts.interop.pickles import read_pickle

__all__ = ["CONFIG_FILE", "KINDS", "PREFIX", "TENSOR_FILE", "AdapterTensors", "read_adapter_config", "settings_of"]

CONFIG_FILE = "adapter_config.json"

# Where an adapter comes from, and which modules it was put on: the tensors in the file say that themselves.
_ABOUT = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"),
    *("exclude_modules", "layers_pattern", "layers_to_transform", "target_modules", "task_type"),
}
# Fields that only training knows, or that mean nothing without one of those that are refused.
_TRAINING = {
    *("corda_config", "eva_config", "lora_dropout", "lora_ga_config", "loftq_config"),
    *("megatron_core", "qalora_group_size", "runtime_config"),
}
_LORA = {
    *("alpha_pattern", "bias", "fan_in_fan_out", "init_lora_weights", "lora_alpha", "lora_bias", "modules_to_save"),
    *("r", "rank_pattern", "use_dora", "use_rslora"),
}
_SHIRA = {"fan_in_fan_out", "init_weights", "mask_type", "modules_to_save", "r", "random_seed"}
_SUPERTUNING = {
    *("init_weights", "lora_alpha", "lora_dropout", "modules_to_save", "r", "save_precomputed_indices"),
    *("select_top", "sparsity"),
}
KINDS = {"LORA": _LORA | _TRAINING, "SHIRA": _SHIRA, "SUPERTUNING": _SUPERTUNING}

_NOT_SET: tuple[Any, ...] = (None, False, {}, [], "")
_NO_DELTA = {
    "alora_invocation_tokens": "acts only after some tokens",
    "arrow_config": "chooses among adapters at each token",
    "ensure_weight_tying": "shares factors between two weights",
    "kasa_config": "changes the base itself",
    "layer_replication": "repeats layers of the base",
    "monteclora_config": "draws its weights at random",
    "target_parameters": "moves parameters by other names than their modules",
    "trainable_token_indices": "trains single rows of the embeddings",
    "use_qalora": "averages groups of inputs for a quantised base",
}
# The initialisations that leave the base as it is; the others subtract what they begin with from it.
_HARMLESS_STARTS = (True, False, None, "true", "gaussian", "eva", "orthogonal")


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """Read the configuration of an adapter whose kind and every field are understood.

    Raises:
        FileNotFoundError: The directory has no `adapter_config.json`; a folder in it that has one is named.
        ValueError: The file is damaged, or a field makes the adapter something that no reader here understands.
    """
    file = directory / CONFIG_FILE
    inner = sorted(found.parent for found in directory.glob(f"*/{CONFIG_FILE}"))
    config = read_json(file, f"so {directory} is no PEFT adapter" + (f"; give {inner[0]}" if inner else ""))
    if not isinstance(config, dict):
        raise ValueError(f"{file} is damaged: it holds no JSON object")
    kind = config.get("peft_type")
    if kind not in KINDS:
        raise ValueError(f"{file} has peft_type {kind!r}, and only {', '.join(KINDS)} can be told in deltas here")
    for field, value in config.items():
        if value not in _NOT_SET and field not in _ABOUT | KINDS[kind]:
            raise ValueError(f"{file} sets {field} to {value!r}: {_why_not(field)}, so it is not read")
    start = config.get("init_lora_weights")
    if start not in _HARMLESS_STARTS:
        raise ValueError(
            f"{file} sets init_lora_weights to {start!r}, which may have changed the base before training; save the "
            "adapter with PEFT's path_initial_model_for_weight_conversion, which makes it a plain LoRA of the base"
        )
    return config


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that say how the adapter was made, without those that are not set."""
    left_out = _ABOUT - {"target_modules", "peft_version"}
    return {name: value for name, value in config.items() if name not in left_out and value not in _NOT_SET}


def _why_not(field: str) -> str:
    if field in _NO_DELTA:
        return f"that {_NO_DELTA[field]}, which is no fixed delta of a weight of the base"
    return "it is not known here whether that changes what the adapter computes"


TENSOR_FILE = "adapter_model.safetensors"
_LEGACY_FILE = "adapter_model.bin"
PREFIX = "base_model.model."


class AdapterTensors:
    """The tensors of an adapter by their key, without the prefix that all keys have.

    Attributes:
        file: Where they are.
        shapes: Shape of each tensor.

    Args:
        directory: The adapter's directory.

    Raises:
        FileNotFoundError: There is no file of tensors.
        ValueError: The file is damaged, or a key lacks the prefix `base_model.model.`.
    """

    def __init__(self, directory: Path) -> None:
        legacy = directory / _LEGACY_FILE
        self.file = directory / TENSOR_FILE
        self._loaded: dict[str, Tensor] = {}
        if not self.file.is_file() and legacy.is_file():
            self.file, self._loaded = legacy, _load_legacy(legacy)
            shapes = {key: tensor.shape for key, tensor in self._loaded.items()}
        else:
            shapes = _read_shapes(self.file)
        strangers = [key for key in shapes if not key.startswith(PREFIX)]
        if strangers or not shapes:
            what = f"the key {strangers[0]} does not begin with {PREFIX}" if strangers else "it holds no tensor"
            raise ValueError(f"{self.file} is not what PEFT saves: {what}")
        self.shapes: Mapping[str, torch.Size] = {key.removeprefix(PREFIX): shapes[key] for key in sorted(shapes)}

    def read(self, key: str) -> Tensor:
        """Return one tensor, as it is stored."""
        if self._loaded:
            return self._loaded[PREFIX + key]
        with open_tensors(self.file) as tensors:
            return tensors.get_tensor(PREFIX + key)


def _read_shapes(file: Path) -> dict[str, torch.Size]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing, so the adapter has no tensors")
    with open_tensors(file) as tensors:
        return {key: torch.Size(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118


def _load_legacy(file: Path) -> dict[str, Tensor]:
    loaded = read_pickle(file)
    if not all(isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in loaded.items()):
        raise ValueError(f"{file} is not what PEFT saves: it holds more than tensors by their names")
    return loaded
