"""Stored weights: the tensors in a checkpoint's files by the names that its model gives them, read one at a time.

Every question but `read` is answered from the headers of the files.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from modular_experts.base.files import open_tensors, weight_files
from modular_experts.base.shards import dtype_named
from modular_experts.base.structure import Skeleton
from modular_experts.deltas import all_finite
from modular_experts.library.tensorfile import MappedTensors

__all__ = ["StoredWeights"]

_DTYPES = {"F64", "F32", "F16", "BF16"}


class StoredWeights:
    """The weights of one checkpoint on disk, of which one at a time is in memory: the one that was read last.

    Args:
        directory: A model directory with safetensors weights.
        skeleton: What its model is made of.

    Raises:
        ValueError: The files lack a weight of the model, or hold one that is quantised.
    """

    def __init__(self, directory: Path, skeleton: Skeleton) -> None:
        self.skeleton = skeleton
        self._files: dict[str, Path] = {}
        self._layouts: dict[str, tuple[str, torch.Size]] = {}
        for file in weight_files(directory):
            with open_tensors(file) as tensors:
                for key in tensors.keys():  # noqa: SIM118 - not a dict
                    entry = tensors.get_slice(key)
                    self._files[key] = file
                    self._layouts[key] = (entry.get_dtype(), torch.Size(entry.get_shape()))
        self._keys: dict[str, list[str]] = {name: [] for name in skeleton.weights()}
        for key in self._files:
            name = skeleton.name_of(key)
            if name is not None:
                self._keys[skeleton.owners[name]].append(key)
        self._check()
        self._last: tuple[str, Tensor] | None = None
        self._open: tuple[Path, MappedTensors] | None = None

    def keys(self, name: str) -> list[str]:
        """Return under which names the files hold a weight: several if it is tied and was stored more than once."""
        return self._keys[self.skeleton.owners[name]]

    def shape(self, name: str) -> torch.Size:
        """Return the shape of a weight as stored."""
        return self._layouts[self.keys(name)[0]][1]

    def dtype(self, name: str) -> torch.dtype:
        """Return the data type of a weight as stored."""
        return dtype_named(self._layouts[self.keys(name)[0]][0])

    def unclaimed(self) -> set[str]:
        """Return the names of the stored tensors that are no weight of the model."""
        return self._files.keys() - {key for keys in self._keys.values() for key in keys}

    def read(self, name: str) -> Tensor:
        """Return one weight as stored: a view of the mapped file, never to be written to.

        Raises:
            ValueError: It holds numbers that are not finite, or it is tied and was stored with two different values.
        """
        owner = self.skeleton.owners[name]
        if self._last and self._last[0] != owner:
            for key in self.keys(self._last[0]):
                self._mapped(key).release(key)
            self._last = None
        if not self._last:
            self._last = owner, self._checked(owner)
        return self._last[1]

    def _mapped(self, key: str) -> MappedTensors:
        """Return the file of a tensor; one is open at a time, as a checkpoint may have more than a process may open."""
        if not self._open or self._open[0] != self._files[key]:
            self._open = self._files[key], MappedTensors(self._files[key])
        return self._open[1]

    def _checked(self, name: str) -> Tensor:
        first, *others = self.keys(name)
        tensor = self._mapped(first)[first]
        if not all_finite(tensor):
            raise ValueError(f"{first} of {self.skeleton.place} holds numbers that are not finite (NaN or infinity)")
        for other in others:
            if not torch.equal(self._mapped(other)[other], tensor):
                raise ValueError(
                    f"{first} and {other} are one tensor (tied) by the configuration of {self.skeleton.place}, and its "
                    "files hold different values for them; correct tie_word_embeddings in its config.json"
                )
        return tensor

    def _check(self) -> None:
        missing = [name for name, keys in self._keys.items() if not keys]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            others = sorted(key for key in self.unclaimed() if not self.skeleton.is_unused(key))
            hint = f"; they hold {others[0]}, which is no weight of it" if others else ""
            raise ValueError(
                f"the files of {self.skeleton.place} do not hold {missing[0]}{more}, which its model "
                f"({self.skeleton.model}) has{hint}; an import needs a tensor for each weight"
            )
        for name, keys in self._keys.items():
            for key in keys:
                self._check_layout(key, self.skeleton.shapes[name])

    def _check_layout(self, key: str, expected: torch.Size) -> None:
        dtype, shape = self._layouts[key]
        if dtype not in _DTYPES:
            raise ValueError(
                f"{key} of {self.skeleton.place} is stored as {dtype}: a quantised checkpoint has no exact difference "
                "from its base; give the checkpoint from before it was quantised"
            )
        if shape != expected:
            raise ValueError(
                f"{key} of {self.skeleton.place} is stored in shape {tuple(shape)}, and by its config.json it has "
                f"{tuple(expected)}; its files do not belong together"
            )
