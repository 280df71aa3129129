"""Stored weights: the tensors in a checkpoint's files by the names that its model gives them, read one at a time.

Every question but `read` is answered from the headers of the files.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from modular_experts.interop.skeleton import Skeleton
from modular_experts.interop.weights import open_tensors, weight_files

__all__ = ["StoredWeights"]

_DTYPES = {"F64", "F32", "F16", "BF16"}


class StoredWeights:
    """The weights of one checkpoint on disk.

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

    def keys(self, name: str) -> list[str]:
        """Return under which names the files hold a weight: several if it is tied and was stored more than once."""
        return self._keys[self.skeleton.owners[name]]

    def shape(self, name: str) -> torch.Size:
        """Return the shape of a weight as stored."""
        return self._layouts[self.keys(name)[0]][1]

    def unclaimed(self) -> set[str]:
        """Return the names of the stored tensors that are no weight of the model."""
        return self._files.keys() - {key for keys in self._keys.values() for key in keys}

    def read(self, name: str) -> Tensor:
        """Return one weight as stored.

        Raises:
            ValueError: It holds numbers that are not finite, or it is tied and was stored with two different values.
        """
        first, *others = self.keys(name)
        tensor = self._read(first)
        if tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():  # they pass a NaN on
            raise ValueError(f"{first} of {self.skeleton.place} holds numbers that are not finite (NaN or infinity)")
        for other in others:
            if not torch.equal(self._read(other), tensor):
                raise ValueError(
                    f"{first} and {other} are one tensor (tied) by the configuration of {self.skeleton.place}, and its "
                    "files hold different values for them; correct tie_word_embeddings in its config.json"
                )
        return tensor

    def _read(self, key: str) -> Tensor:
        with open_tensors(self._files[key]) as tensors:
            return tensors.get_tensor(key)

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
