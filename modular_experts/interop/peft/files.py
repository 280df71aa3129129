"""Read the two files of an adapter: `adapter_config.json`, and its tensors.

A field of a plain LoRA's configuration is known to change nothing, or is understood by its reader; with any other one
PEFT must read the adapter, so no setting that could move a weight is ignored. Names and defaults come from PEFT.
"""

import importlib
import pickle
import re
import struct
from collections.abc import Container, Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from modular_experts.library.opening import ADAPTER_FILE
from modular_experts.library.record import Record, read_json
from modular_experts.library.tensorfile import open_tensors

CONFIG_FILE = ADAPTER_FILE
TENSOR_FILE = "adapter_model.safetensors"
ADAPTER_FILES = (CONFIG_FILE, TENSOR_FILE, "adapter_model.bin")
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
NOT_SET: tuple[object, ...] = (None, False, {}, [], "")
# The initialisations that leave the base as it is; the others subtract their start from it.
_HARMLESS_STARTS = (True, False, None, "true", "gaussian", "eva", "orthogonal")
# What torch's unpickler raised over thousands of files with bytes changed at random.
_DAMAGE = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, LookupError),
    *(ValueError, TypeError, AssertionError, struct.error),
)


class AdapterFiles:
    """An adapter in a directory: its configuration, read at once, and its tensors, read when asked for."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory).expanduser()
        self.config = read_json(self.directory / CONFIG_FILE, f"so {self.directory} is not a PEFT adapter")
        new = self.directory / TENSOR_FILE
        old = self.directory / "adapter_model.bin"
        self.file = old if old.is_file() and not new.is_file() else new

    def existing_file(self) -> Path:
        """Return the file of tensors, or raise FileNotFoundError."""
        if not self.file.is_file():
            raise FileNotFoundError(f"{self.file} is missing, so the adapter has no tensors")
        return self.file

    @property
    def base(self) -> str | None:
        named = self.config.get("base_model_name_or_path")
        return named if isinstance(named, str) and named else None

    @property
    def revision(self) -> str | None:
        return self.config.get("revision") or None

    def settings(self) -> Record:
        """Return the fields about the adapter's training that are set."""
        left_out = _ABOUT - {"target_modules", "peft_version"}
        return {name: value for name, value in self.config.items() if name not in left_out and value not in NOT_SET}

    def obstacle(self, head: Container[str] = ()) -> str | None:
        """Return why this is not a plain LoRA, which needs no PEFT: its type, a setting or a tensor.

        The tensors `head` of a classifier's last layer may lie beside it.
        """
        file = self.directory / CONFIG_FILE
        kind = self.config.get("peft_type")
        if kind != "LORA":
            return f"{file} has peft_type {kind!r}, which cannot be read"
        for field, value in self.config.items():
            known = value in NOT_SET or field in _ABOUT | _LORA or (head and field == "modules_to_save")
            if not known or (field == "bias" and value != "none"):
                return f"{file} sets {field} to {value!r}, which may move weights and cannot be read"
        start = self.config.get("init_lora_weights")
        if start not in _HARMLESS_STARTS:
            return f"{file} sets init_lora_weights to {start!r}, which may have changed the base and cannot be read"
        of_lora = tuple(f".{suffix}" for suffix in LORA_TENSORS)
        others = [key for key in self.tensors if key not in head and not key.endswith(of_lora)]
        return f"{self.file} holds {others[0]}, which cannot be read" if others else None

    @cached_property
    def stored(self) -> Mapping[str, Tensor]:
        if self.file.name != TENSOR_FILE:
            return _read_pickle(self.file)
        with open_tensors(self.existing_file()) as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - not a dict

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors of a LoRA by key, sorted, without the prefix `base_model.model.`, which all have in the file."""
        strangers = [key for key in self.stored if not (isinstance(key, str) and key.startswith(PREFIX))]
        if strangers or not self.stored or not all(isinstance(tensor, Tensor) for tensor in self.stored.values()):
            what = (
                f"the key {strangers[0]} does not begin with {PREFIX}" if strangers else "it holds no tensors by name"
            )
            raise ValueError(f"{self.file} is not what PEFT saves: {what}")
        return {key.removeprefix(PREFIX): self.stored[key] for key in sorted(self.stored)}


def _read_pickle(file: Path) -> dict[str, Tensor]:
    """Read the mapping in a file that `torch.save` wrote, without running any code in it."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except _DAMAGE as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = f"it asks to run {asked[1]}, and no code in a file is run" if asked else "it is damaged or not from torch"
        raise ValueError(f"{file} was not read: {why}; get the weights as safetensors, or from another copy") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} was not read: it holds a {type(content).__name__} instead of a mapping")
    return content


def import_peft(missing: str) -> None:
    """Import PEFT; raise ValueError `missing` if it is not installed, or with the reason if its import fails."""
    try:
        importlib.import_module("peft")
    except ImportError as error:
        is_missing = isinstance(error, ModuleNotFoundError) and error.name == "peft"
        broken = f"PEFT is installed and cannot be imported ({error}); update it: pip install -U peft"
        raise ValueError(missing if is_missing else broken) from error
