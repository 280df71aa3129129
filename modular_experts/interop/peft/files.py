"""Read the two files of an adapter: `adapter_config.json`, and its tensors.

A field of a plain LoRA's configuration is known to change nothing, or is understood by its reader; with any other one
PEFT must read the adapter, so no setting that could move a weight is ignored. Names and defaults come from PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modular_experts.base.files import open_tensors
from modular_experts.interop.adapter import read_pickle
from modular_experts.library.record import read_json

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
_OLD_TENSOR_FILE = "adapter_model.bin"
PREFIX = "base_model.model."

LORA_TENSORS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")
"""The last parts of the keys of a plain LoRA's tensors."""

# Where an adapter comes from, and which modules it adapts: the tensors show that themselves.
_ABOUT = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"),
    *("exclude_modules", "layers_pattern", "layers_to_transform", "target_modules", "task_type"),
}
# The other fields of a plain LoRA: those that only training reads, or that mean nothing without another field, too.
_LORA = {
    *("alpha_pattern", "bias", "fan_in_fan_out", "init_lora_weights", "lora_alpha", "r", "rank_pattern", "use_rslora"),
    *("corda_config", "eva_config", "lora_dropout", "lora_ga_config", "loftq_config"),
    *("megatron_core", "qalora_group_size", "runtime_config"),
}
_NOT_SET: tuple[Any, ...] = (None, False, {}, [], "")
# The initialisations that leave the base as it is; the others subtract their start from it.
_HARMLESS_STARTS = (True, False, None, "true", "gaussian", "eva", "orthogonal")


class AdapterFiles:
    """An adapter in a directory: its configuration, read at once, and its tensors by key, read when asked for.

    Keys leave out the prefix `base_model.model.`, which all of them have in the file.

    Attributes:
        directory: The adapter's directory.
        config: Content of `adapter_config.json`.
        file: The file of tensors.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory).expanduser()
        self.config = read_json(self.directory / CONFIG_FILE, f"so {self.directory} is not a PEFT adapter")
        new, old = self.directory / TENSOR_FILE, self.directory / _OLD_TENSOR_FILE
        self._is_old = old.is_file() and not new.is_file()
        self.file = old if self._is_old else new

    @property
    def base(self) -> str | None:
        """Path or hub id of the base, if the configuration names it."""
        named = self.config.get("base_model_name_or_path")
        return named if isinstance(named, str) and named else None

    @property
    def revision(self) -> str | None:
        """Branch, tag or commit of the base on the hub, if the configuration names it."""
        return self.config.get("revision") or None

    def settings(self) -> dict[str, Any]:
        """Return the fields about the adapter's training that are set."""
        left_out = _ABOUT - {"target_modules", "peft_version"}
        return {name: value for name, value in self.config.items() if name not in left_out and value not in _NOT_SET}

    def obstacle(self) -> str | None:
        """Return why this is not a plain LoRA, which needs no PEFT: its type, a setting or a tensor."""
        file, kind = self.directory / CONFIG_FILE, self.config.get("peft_type")
        if kind != "LORA":
            return f"{file} has peft_type {kind!r}, which cannot be read"
        for field, value in self.config.items():
            known = value in _NOT_SET or field in _ABOUT | _LORA
            if not known or (field == "bias" and value != "none"):
                return f"{file} sets {field} to {value!r}, which may move weights and cannot be read"
        start = self.config.get("init_lora_weights")
        if start not in _HARMLESS_STARTS:
            return f"{file} sets init_lora_weights to {start!r}, which may have changed the base and cannot be read"
        others = [key for key in self.shapes if not key.endswith(tuple(f".{suffix}" for suffix in LORA_TENSORS))]
        return f"{self.file} holds {others[0]}, which cannot be read" if others else None

    @cached_property
    def shapes(self) -> Mapping[str, torch.Size]:
        """Shape of each tensor, by key, sorted."""
        if self._is_old:
            shapes = {key: tensor.shape for key, tensor in self._pickled.items()}
        elif not self.file.is_file():
            raise FileNotFoundError(f"{self.file} is missing, so the adapter has no tensors")
        else:
            with open_tensors(self.file) as tensors:
                shapes = {key: torch.Size(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
        strangers = [key for key in shapes if not key.startswith(PREFIX)]
        if strangers or not shapes:
            what = f"the key {strangers[0]} does not begin with {PREFIX}" if strangers else "it holds no tensor"
            raise ValueError(f"{self.file} is not what PEFT saves: {what}")
        return {key.removeprefix(PREFIX): shapes[key] for key in sorted(shapes)}

    def read(self, key: str) -> Tensor:
        """Return one tensor as stored."""
        if self._is_old:
            return self._pickled[PREFIX + key]
        with open_tensors(self.file) as tensors:
            return tensors.get_tensor(PREFIX + key)

    @cached_property
    def _pickled(self) -> Mapping[str, Tensor]:
        """The tensors of an older adapter, whose pickled file can only be read as a whole."""
        loaded = read_pickle(self.file)
        if not all(isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in loaded.items()):
            raise ValueError(f"{self.file} is not what PEFT saves: it holds more than tensors by their names")
        return loaded
