"""Read a checkpoint's tensors one at a time, by the names that its model gives them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from modular_experts.base.structure import Structure
from modular_experts.deltas import all_finite
from modular_experts.library.tensorfile import DTYPES, MappedTensors


class StoredWeights:
    """The weights of one checkpoint on disk; only the last one that was read is in memory.

    Args:
        layouts: Dtype and shape of each stored tensor, by file, from `read_layouts`.

    Raises:
        ValueError: The files lack a weight of the model, hold one in another shape, or hold a quantised one.
    """

    def __init__(self, layouts: Mapping[Path, Mapping[str, tuple[str, torch.Size]]], structure: Structure) -> None:
        self.structure = structure
        self._files = {key: file for file, layout in layouts.items() for key in layout}
        self._layouts = {key: entry for layout in layouts.values() for key, entry in layout.items()}
        self._keys: dict[str, list[str]] = {name: [] for name in structure.weights}
        for key in self._files:
            name = structure.name_of(key)
            if name is not None:
                self._keys[structure.owners[name]].append(key)
        self._last: tuple[str, Tensor] | None = None
        self._open: tuple[Path, MappedTensors] | None = None
        place, missing = structure.place, [name for name, keys in self._keys.items() if not keys]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            others = sorted(key for key in self.unclaimed() if not structure.is_unused(key))
            hint = f"; they hold {others[0]}, which is not one of its weights" if others else ""
            raise ValueError(
                f"the files of {place} do not hold {missing[0]}{more}, which its model ({structure.architecture}) "
                f"has{hint}; an import needs a tensor for each weight"
            )
        for name, keys in self._keys.items():
            for key in keys:
                (dtype, shape), expected = self._layouts[key], structure.shapes[name]
                if dtype not in ("F64", "F32", "F16", "BF16"):
                    raise ValueError(
                        f"{key} of {place} is stored as {dtype}: a quantised checkpoint has no exact difference from "
                        "its base; give the checkpoint from before it was quantised"
                    )
                if shape != expected:
                    raise ValueError(
                        f"{key} of {place} is stored in shape {tuple(shape)}, and by its config.json it has "
                        f"{tuple(expected)}; its files do not belong together"
                    )

    def keys(self, name: str) -> list[str]:
        """Return under which names the files hold a weight: several if it is tied and was stored more than once."""
        return self._keys[self.structure.owners[name]]

    def shape(self, name: str) -> torch.Size:
        """Return the shape of a weight as stored."""
        return self._layouts[self.keys(name)[0]][1]

    def dtype(self, name: str) -> torch.dtype:
        """Return the data type of a weight as stored."""
        return DTYPES[self._layouts[self.keys(name)[0]][0]]

    def unclaimed(self) -> set[str]:
        """Return the names of the stored tensors that are not weights of the model."""
        return self._files.keys() - {key for keys in self._keys.values() for key in keys}

    def read(self, name: str) -> Tensor:
        """Return one weight as stored: a view of the mapped file, never to be written to.

        Raises:
            ValueError: It holds NaN or infinity, or it is tied and the files hold two different values for it.
        """
        owner, place = self.structure.owners[name], self.structure.place
        if self._last and self._last[0] != owner:
            for key in self.keys(self._last[0]):
                self._mapped(key).release(key)
            self._last = None
        if not self._last:
            first, *others = self.keys(owner)
            tensor = self._mapped(first)[first]
            if not all_finite(tensor):
                raise ValueError(f"{first} of {place} holds numbers that are not finite (NaN or infinity)")
            for other in others:
                if not torch.equal(self._mapped(other)[other], tensor):
                    raise ValueError(
                        f"{first} and {other} are one tensor (tied) by the configuration of {place}, and its files "
                        "hold different values for them; correct tie_word_embeddings in its config.json"
                    )
            self._last = owner, tensor
        return self._last[1]

    def _mapped(self, key: str) -> MappedTensors:
        """Return the file of a tensor; one is open at a time, as a checkpoint may have more than a process may open."""
        if not self._open or self._open[0] != self._files[key]:
            self._open = self._files[key], MappedTensors(self._files[key])
        return self._open[1]
