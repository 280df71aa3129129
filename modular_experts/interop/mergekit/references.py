"""References: how a recipe names a model - `path`, `path@revision`, `path+adapter`, or a mapping of these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modular_experts.interop.mergekit.keys import check_keys

__all__ = ["ModelPath", "Reference", "read_reference"]


@dataclass(frozen=True)
class ModelPath:
    """A directory or hub id.

    Attributes:
        path: The directory or hub id.
        revision: Branch, tag or commit of a hub id.
    """

    path: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.path}@{self.revision}" if self.revision else self.path


@dataclass(frozen=True)
class Reference:
    """A model, and the adapter on it if there is one."""

    model: ModelPath
    adapter: ModelPath | None = None

    def __str__(self) -> str:
        return f"{self.model}+{self.adapter}" if self.adapter else str(self.model)


def read_reference(value: Any, where: str) -> Reference:
    """Read how a recipe names a model.

    Args:
        value: `path[@revision][+adapter[@revision]]`, or a mapping with `model` and `lora`.
        where: Its place in the file, for the sentence.

    Raises:
        ValueError: It is neither.
    """
    if isinstance(value, Mapping):
        return _of_mapping(value, where)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where} must name a model, such as path, path@revision or path+adapter, got {value!r}")
    names = value.split("+")
    if len(names) > 2:
        raise ValueError(f"{where} has more than one + ({value!r}), and only one adapter can be put on a model")
    return Reference(*(_path(name, where) for name in names))


def _of_mapping(value: Mapping[str, Any], where: str) -> Reference:
    check_keys(value, {"model", "lora", "override_architecture"}, where)
    if value.get("override_architecture") is not None:
        raise ValueError(f"{where} asks for override_architecture, which is not supported; leave it out")
    adapter = value.get("lora")
    return Reference(
        _path(value.get("model"), f"{where}.model"), None if adapter is None else _path(adapter, f"{where}.lora")
    )


def _path(value: Any, where: str) -> ModelPath:
    if isinstance(value, Mapping):
        check_keys(value, {"path", "revision"}, where)
        path, revision = value.get("path"), value.get("revision")
    else:
        path, at, revision = value.partition("@") if isinstance(value, str) else (None, "", None)
        revision = revision if at else None
    if not isinstance(path, str) or not path or (revision is not None and not _is_revision(revision)):
        raise ValueError(f"{where} must be path or path@revision, got {value!r}")
    return ModelPath(path, revision)


def _is_revision(revision: Any) -> bool:
    return isinstance(revision, str) and bool(revision) and "@" not in revision
