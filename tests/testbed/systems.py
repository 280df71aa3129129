"""The related systems that there are: without a folder of `modular_experts/systems`, only tests of that system go."""

import pkgutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


def of(path: str, **settings: Any) -> Any:
    """Return the class at a path below `modular_experts.systems`, such as `tt_lora.TTLoRAExpert`, with settings."""
    found = pkgutil.resolve_name(f"modular_experts.systems.{path}")
    return partial(found, **settings) if settings else found


def there(rows: Mapping[str, Callable[[], T]]) -> dict[str, T]:
    """Return what each row makes, without the rows whose system is not there."""
    found = {}
    for name, make in rows.items():
        with suppress(ModuleNotFoundError):
            found[name] = make()
    return found
