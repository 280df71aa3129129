"""Foreign experts: what another tool trained, told in deltas - and where it says that it comes from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from modular_experts.deltas import Delta

__all__ = ["ForeignExpert"]


@dataclass(frozen=True)
class ForeignExpert:
    """An expert read from another tool's files.

    Attributes:
        deltas: Name of each moved weight, as the loaded base calls it, and its delta, one weight in memory at a time;
            it can be gone through more than once.
        kind: What it is called where it comes from, such as `LORA`.
        base: The base as the files name it, a path or a hub id; none where they do not say.
        revision: Branch, tag or commit of that base, as the files say.
        settings: The settings that made it, as the files give them.
    """

    deltas: Iterable[tuple[str, Delta]]
    kind: str
    base: str | None = None
    revision: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
