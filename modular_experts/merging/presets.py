"""Presets: what a peer means by the name of a method, as values for the settings that the user leaves open.

A method with presets has `None` for every setting that they fill. They are filled when the method is made, so the
record of a merge holds every value that counted, whoever chose it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from modular_experts.merging.method import MergeMethod

__all__ = ["fill_from_preset"]


def fill_from_preset(method: MergeMethod, preset: str | None, presets: Mapping[str | None, Mapping[str, Any]]) -> None:
    """Set each field that is None to the value of the preset; `presets[None]` says all that a preset does not.

    Raises:
        ValueError: There is no such preset, or it has no value for a field, because its peer has none.
    """
    name = type(method).__name__
    if preset not in presets:
        known = [known for known in presets if known]
        near = difflib.get_close_matches(str(preset), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the presets are {', '.join(known)}"
        raise ValueError(f"{name}: there is no preset {preset!r}; {hint}")
    for field, value in {**presets[None], **presets[preset]}.items():
        if getattr(method, field) is None:
            if value is None:
                raise ValueError(f"{name}: {preset} has no default for {field}; give a value")
            object.__setattr__(method, field, value)
