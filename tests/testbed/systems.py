"""The related systems that there are: without a folder of `modular_experts/systems`, only tests of that system go.

And what their tests share: a weight, random values for its expert, and a few steps.
"""

import pkgutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

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


def random_weight(rows: int = 12, columns: int = 10) -> torch.Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def filled(module: nn.Module, spread: float = 1.0) -> nn.Module:
    """Give every trained number a random value."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.copy_(spread * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    return module


def five_steps(module: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Train a module by AdamW on random inputs `(6, 10)`, towards outputs of 1."""
    optimizer = torch.optim.AdamW([one for one in module.parameters() if one.requires_grad], lr=0.02)
    draw = torch.Generator().manual_seed(1)
    for _ in range(5):
        forward(torch.randn(6, 10, dtype=torch.float64, generator=draw)).sub(1.0).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
