"""Scaling: rank and factor of the LoRA of one module, from an adapter's configuration.

The factor is `lora_alpha / r`, with `use_rslora` `lora_alpha / sqrt(r)` (Kalajdzievski 2023). `rank_pattern` and
`alpha_pattern` override both numbers for modules: their keys are regular expressions for the module's name or what
follows one of its dots, and the first that fits counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

__all__ = ["rank_and_scaling"]


def rank_and_scaling(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Return rank and factor of a module.

    Args:
        config: The adapter's configuration.
        module: Full name of the module.

    Raises:
        ValueError: A number is none, or a pattern is no regular expression.
    """
    rank = _first(config.get("rank_pattern"), module, config.get("r", 8))  # PEFT's own defaults
    alpha = _first(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"the rank of {module} must be a whole number above 0, got {rank!r}")
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ValueError(f"lora_alpha of {module} must be a number, got {alpha!r}")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _first(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    if not isinstance(patterns or {}, Mapping):
        raise ValueError(f"rank_pattern and alpha_pattern must be tables of names and numbers, got {patterns!r}")
    for pattern, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise ValueError(f"the pattern {pattern!r} is no regular expression ({error})") from error
    return default
