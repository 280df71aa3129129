"""Reading PEFT adapters: a directory with `adapter_config.json` and its tensors, told in deltas of the base.

Understood are LORA (with rsLoRA, DoRA, rank and alpha patterns, embeddings, biases and `modules_to_save`), SHIRA and
SUPERTUNING. Which modules are moved is what the tensors say. Anything else is refused by name; nothing is passed over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from modular_experts.base import Base
from modular_experts.deltas import Delta, add
from modular_experts.interop.adapter import ForeignExpert
from modular_experts.interop.peft.files import CONFIG_FILE, AdapterTensors, read_adapter_config, settings_of
from modular_experts.interop.peft.parts import (
    LORA_TENSORS,
    SHIRA_TENSORS,
    SUPERTUNING_TENSORS,
    Normed,
    Part,
    Replaced,
    lora_parts,
    shira_parts,
    supertuning_parts,
)
from modular_experts.text import did_you_mean

__all__ = ["read_peft"]

_TENSORS = {"LORA": LORA_TENSORS, "SHIRA": SHIRA_TENSORS, "SUPERTUNING": SUPERTUNING_TENSORS}
_OWN = ("base_layer.weight", "base_layer.bias")  # the adapted module's own tensors, stored with the adapter


def read_peft(directory: str | Path, base: str | Path | Base | None = None, drop_zeros: bool = False) -> ForeignExpert:
    """Read an adapter that PEFT saved, as deltas of its base.

    Names, shapes and settings are checked at once; numbers are read when the deltas are gone through, one weight at a
    time. A LoRA is `LowRank`, with its factor in `up`; SHiRA and Super-Tuning are `Sparse`; DoRA, whole tensors
    (`modules_to_save`, biases) and Super-Tuning with a LoRA beside it are `Dense`. Each has the shape and the
    orientation of the base's parameter. A whole tensor that equals the base's is left out.

    Args:
        directory: The adapter's directory.
        base: The base's directory or hub id; as the adapter's configuration says if none is given.
        drop_zeros: Whether entries of a sparse adapter whose value is zero, such as padding, are left out; they are
            places where training could go on.

    Raises:
        FileNotFoundError: A file of the adapter, or the base, is missing.
        ValueError: A file is damaged, or the adapter is something that no deltas of this base can say: an unknown
            setting, a tensor or a module that the base does not have, a shape that does not fit. (A weight that the
            base ties to another one, or a number that is wrong, is found when the deltas are gone through.)
    """
    folder = Path(directory).expanduser()
    config = read_adapter_config(folder)
    tensors = AdapterTensors(folder)
    recorded, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not (base or (isinstance(recorded, str) and recorded)):
        raise ValueError(f"{folder / CONFIG_FILE} does not say what the adapter's base is; name the base")
    opened = Base.open(base or recorded, revision=None if base else revision)
    return ForeignExpert(
        deltas=_AdapterDeltas(config, tensors, opened, drop_zeros),
        kind=config["peft_type"],
        base=recorded or None,
        revision=revision,
        settings=settings_of(config),
    )


class _AdapterDeltas(Iterable[tuple[str, Delta]]):
    """The deltas of an adapter; every iteration reads its numbers anew."""

    def __init__(self, config: Mapping[str, Any], tensors: AdapterTensors, base: Base, drop_zeros: bool) -> None:
        self._config, self._tensors, self._base, self._drop_zeros = config, tensors, base, drop_zeros
        self._structure, self._model = base.structure, base.structure.model
        self._parts = self._all_parts()

    def __iter__(self) -> Iterator[tuple[str, Delta]]:
        for name, parts in self._parts.items():
            try:
                terms = [part.delta(self._tensors.read, partial(self._base.weight, name)) for part in parts]
            except ValueError as error:
                raise self._damaged(f"{error} ({name})") from error
            moving = [term for part, term in zip(parts, terms, strict=True) if not _is_the_base(part, term)]
            if moving and len(self._structure.twins(name)) > 1:
                raise ValueError(
                    f"{self._tensors.file} moves {name}, which {type(self._model).__name__} ties to another weight; "
                    "PEFT moves it in one of the two places only, and no delta of the one tensor can say that"
                )
            if moving:
                yield name, add(moving)

    def _all_parts(self) -> dict[str, list[Part]]:
        """Return the parts of each moved weight, by its name in the base."""
        modules, whole = self._grouped()
        parts: dict[str, list[Part]] = {}
        for module, found in sorted(modules.items()):
            try:
                own = {name: f"{module}.{name}" for name in _OWN if found.pop(name, None)}
                for name, part in self._parts_of_module(module, found, own.get("base_layer.weight")):
                    parts.setdefault(f"{module}.{name}", []).append(part)
            except ValueError as error:
                raise self._damaged(str(error)) from error
            whole |= {f"{module}.{name.removeprefix('base_layer.')}": key for name, key in own.items()}
        for name, key in sorted(whole.items()):
            if not any(isinstance(part, Normed) for part in parts.get(name, [])):
                parts.setdefault(name, []).append(Replaced(key))
            self._check_shape(name, self._tensors.shapes[key])
        return parts

    def _parts_of_module(self, name: str, found: Mapping[str, torch.Size], start: str | None) -> list[tuple[str, Part]]:
        module = self._model.get_submodule(name)
        if self._config["peft_type"] == "LORA":
            return list(lora_parts(self._config, name, module, found, start).items())
        if self._config["peft_type"] == "SHIRA":
            return [("weight", part) for part in shira_parts(name, module, found, self._drop_zeros)]
        return [("weight", part) for part in supertuning_parts(self._config, name, module, found, self._drop_zeros)]

    def _grouped(self) -> tuple[dict[str, dict[str, torch.Size]], dict[str, str]]:
        """Return the shapes of the tensors of each adapted module, and the key of each tensor that stands for a whole.

        Raises:
            ValueError: There are tensors that are neither.
        """
        modules: dict[str, dict[str, torch.Size]] = {}
        for key, shape in self._tensors.shapes.items():
            for suffix in _TENSORS[self._config["peft_type"]]:
                if key.endswith(f".{suffix}"):
                    modules.setdefault(key.removesuffix(f".{suffix}"), {})[suffix] = shape
        known = {name for name, _ in self._model.named_modules()}
        missing = sorted(modules.keys() - known)
        if missing:
            raise self._unknown(missing, known - {""})
        rest = self._tensors.shapes.keys() - {f"{name}.{suffix}" for name in modules for suffix in modules[name]}
        own = {f"{name}.{suffix}": (name, suffix) for name in modules for suffix in _OWN}
        for key in rest & own.keys():
            name, suffix = own[key]
            modules[name][suffix] = self._tensors.shapes[key]
        whole = {key: key for key in rest - own.keys()}
        strangers = sorted(
            key for key in whole if key not in self._structure.shapes or key.rpartition(".")[0] in modules
        )
        if strangers:
            raise self._unknown(strangers, self._structure.shapes)
        return modules, whole

    def _check_shape(self, name: str, shape: torch.Size) -> None:
        known = self._structure.shapes.get(name)
        if known != shape:
            found = "no such weight" if known is None else tuple(known)
            raise ValueError(
                f"{self._tensors.file} holds {name} with shape {tuple(shape)}, and the base in "
                f"{self._base.directory} has {found}; was its vocabulary resized, or is it another base?"
            )

    def _unknown(self, names: list[str], known: Iterable[str]) -> ValueError:
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        return ValueError(
            f"{self._tensors.file} holds tensors that belong to nothing in {type(self._model).__name__}: "
            f"{shown}{did_you_mean(names[0], known)}"
        )

    def _damaged(self, reason: str) -> ValueError:
        return ValueError(f"{self._tensors.file} does not fit its configuration or its base: {reason}")


def _is_the_base(part: Part, delta: Delta) -> bool:
    """Return whether a part only stores what the base has anyway, as PEFT does with embeddings."""
    return isinstance(part, Replaced) and not delta.dense().any()
