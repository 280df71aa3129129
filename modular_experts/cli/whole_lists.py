"""Whole lists: a list that is given again replaces the one before it.

jsonargparse lays a list over an earlier one of the same length, item by item: a task's `path` on the command line would
meet the `source` or the role of the task in the config. (A list of another length replaces it, so nobody expects that.)
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from functools import partial
from typing import Any

__all__ = ["replace_lists"]


def replace_lists(parser: Any) -> None:
    """Make a parser's options that are lists replace what a config says; `--list+` appends to it, as ever."""
    for action in parser._actions:
        if _is_list(getattr(action, "_typehint", None)):
            action._check_type_ = partial(_whole, action._check_type_)


def _whole(check: Callable[..., Any], value: Any, **settings: Any) -> Any:
    of_last_item = type(value).__name__ == "NestedArg"  # --trainer.callbacks.name sets it in the last callback
    return check(value, **(settings if settings.get("append") or of_last_item else settings | {"cfg": None}))


def _is_list(hint: Any) -> bool:
    return typing.get_origin(hint) is list or any(_is_list(part) for part in typing.get_args(hint))
