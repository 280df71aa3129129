"""Adapter tensors: `adapter_model.safetensors`, or an older `adapter_model.bin`, read without running code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from modular_experts.interop.pickles import read_pickle
from modular_experts.interop.weights import open_tensors

__all__ = ["PREFIX", "TENSOR_FILE", "AdapterTensors"]

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
