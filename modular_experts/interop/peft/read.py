"""Read PEFT adapters as deltas of their base: LORA, SHIRA and SUPERTUNING.

Understood are rsLoRA, DoRA, rank and alpha patterns, embeddings, biases and `modules_to_save`. The tensors show which
modules an adapter moves. The reader refuses everything else by name and ignores nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import torch

from modular_experts.base import Base
from modular_experts.deltas import Delta, add
from modular_experts.interop.adapter import ImportedAdapter
from modular_experts.interop.peft.files import AdapterFiles
from modular_experts.interop.peft.terms import TENSORS, NormedProduct, Replacement, Term, module_terms
from modular_experts.text import did_you_mean

_OWN = ("base_layer.weight", "base_layer.bias")  # the adapted module's own tensors, stored with the adapter


def read_peft(adapter: str | Path | AdapterFiles, base: str | Path | Base | None = None) -> ImportedAdapter:
    """Read an adapter that PEFT saved, as deltas of its base.

    The call checks names, shapes and settings; an iteration over the deltas reads numbers, one weight at a time. A
    LoRA is `LowRank`, with its scaling in `up`; SHiRA and Super-Tuning are `Sparse`; DoRA, whole tensors
    (`modules_to_save`, biases) and Super-Tuning with a LoRA beside it are `Dense`. Each has the shape and the
    orientation of the base's parameter. A whole tensor that equals the base's is left out.

    Args:
        adapter: The adapter's directory.
        base: The base's directory or hub id; the one that the adapter's configuration names if not given.

    Raises:
        FileNotFoundError: A file of the adapter, or the base, is missing.
        ValueError: A file is damaged, or no deltas of this base can express the adapter: an unknown setting, a
            tensor or a module that the base does not have, a shape that does not fit. An iteration raises it for a
            wrong number, and for a weight that the base ties to another one.
    """
    files = adapter if isinstance(adapter, AdapterFiles) else AdapterFiles(adapter)
    if obstacle := files.obstacle():
        raise ValueError(obstacle)
    opened = Base.open(base or files.base, revision=None if base else files.revision)
    return ImportedAdapter(
        deltas=_AdapterDeltas(files, opened),
        kind=files.config["peft_type"],
        base=files.base,
        revision=files.revision,
        settings=files.settings(),
    )


class _AdapterDeltas(Iterable[tuple[str, Delta]]):
    """The deltas of an adapter; every iteration reads its numbers anew."""

    def __init__(self, files: AdapterFiles, base: Base) -> None:
        self._files, self._base = files, base
        self._terms = self._terms_by_weight()

    def __iter__(self) -> Iterator[tuple[str, Delta]]:
        structure = self._base.structure
        for name, terms in self._terms.items():
            moving = []
            try:
                for term in terms:
                    delta = term.delta(self._files.read, partial(self._base.weight, name))
                    # PEFT stores some tensors that it did not train, such as embeddings: they move nothing.
                    if not isinstance(term, Replacement) or delta.dense().any():
                        moving.append(delta)
            except ValueError as error:
                raise self._does_not_fit(f"{error} ({name})") from error
            if moving and len(structure.twins(name)) > 1:
                raise ValueError(
                    f"{self._files.file} moves {name}, which {structure.architecture} ties to another weight, and a "
                    "delta of the one tensor would move both"
                )
            if moving:
                yield name, add(moving)

    def _terms_by_weight(self) -> dict[str, list[Term]]:
        """Return the terms of each moved weight, by its name in the base, once every tensor is known to fit."""
        shapes, structure = self._files.shapes, self._base.structure
        # The shapes of the tensors of each adapted module, by the last parts of their keys.
        adapted: dict[str, dict[str, torch.Size]] = {}
        for key, shape in shapes.items():
            for suffix in (*TENSORS[self._files.config["peft_type"]], *_OWN):
                if key.endswith(f".{suffix}"):
                    adapted.setdefault(key.removesuffix(f".{suffix}"), {})[suffix] = shape
        modules = {name for name, _ in structure.model.named_modules()} - {""}
        self._check_known(adapted.keys() - modules, modules)
        rest = shapes.keys() - {f"{name}.{suffix}" for name, found in adapted.items() for suffix in found}
        unknown = {key for key in rest if key not in structure.shapes or key.rpartition(".")[0] in adapted}
        self._check_known(unknown, structure.shapes)
        # The keys of the tensors that replace a weight.
        whole = {key: key for key in rest}
        terms: dict[str, list[Term]] = {}
        for name, found in sorted(adapted.items()):
            own = {suffix: f"{name}.{suffix}" for suffix in _OWN if found.pop(suffix, None)}
            module, replacement = structure.model.get_submodule(name), own.get("base_layer.weight")
            try:
                moved = module_terms(self._files.config, name, module, found, replacement)
            except ValueError as error:
                raise self._does_not_fit(str(error)) from error
            for parameter, its_terms in moved.items():
                terms.setdefault(f"{name}.{parameter}", []).extend(its_terms)
            whole |= {f"{name}.{suffix.removeprefix('base_layer.')}": key for suffix, key in own.items()}
        for name, key in sorted(whole.items()):
            # A DoRA reads the tensor that replaces its weight by itself.
            if not any(isinstance(term, NormedProduct) for term in terms.get(name, [])):
                terms.setdefault(name, []).append(Replacement(key))
            if structure.shapes.get(name) != shapes[key]:
                found_shape = tuple(structure.shapes.get(name, ())) or "no such weight"
                raise ValueError(
                    f"{self._files.file} holds {name} with shape {tuple(shapes[key])}, and the base in "
                    f"{self._base.directory} has {found_shape}; was its vocabulary resized, or is it another base?"
                )
        return terms

    def _check_known(self, strangers: set[str], known: Iterable[str]) -> None:
        """Refuse tensors that have no place in the base."""
        if strangers:
            names = sorted(strangers)
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            raise ValueError(
                f"{self._files.file} holds tensors that belong to nothing in {self._base.structure.architecture}: "
                f"{shown}{did_you_mean(names[0], known)}"
            )

    def _does_not_fit(self, reason: str) -> ValueError:
        return ValueError(f"{self._files.file} does not fit its configuration or its base: {reason}")
