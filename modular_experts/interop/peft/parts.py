"""Parts: what the tensors of an adapter do to one weight of the base; its delta is the sum of the parts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from modular_experts.deltas import Delta, Dense

__all__ = ["Part", "Read", "Replaced", "check_tensors"]

Read = Callable[[str], Tensor]


class Part(ABC):
    """One summand of the delta of one weight."""

    @abstractmethod
    def delta(self, read: Read, base: Callable[[], Tensor]) -> Delta:
        """Return the summand.

        Args:
            read: Gives a tensor of the adapter by its key.
            base: Gives the weight of the base.

        Raises:
            ValueError: The tensors do not hold what they should.
        """


@dataclass(frozen=True)
class Replaced(Part):
    """A whole tensor in the place of the base's: of `modules_to_save`, a trained bias, a saved embedding.

    Args:
        key: Key of the tensor.
    """

    key: str

    def delta(self, read: Read, base: Callable[[], Tensor]) -> Dense:
        return Dense((read(self.key).double() - base().double()).float())


def check_tensors(module: str, found: Mapping[str, torch.Size], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a module whose tensors are not those that the configuration and the base call for.

    Args:
        module: Full name of the module.
        found: Shape of each tensor by the last part of its key.
        wanted: What they should be.

    Raises:
        ValueError: A tensor is missing, of another shape, or not called for.
    """
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            raise ValueError(f"{module} has no {name}")
        if name not in wanted:
            raise ValueError(f"{module} has a {name}, which its configuration does not call for")
        if tuple(found[name]) != wanted[name]:
            raise ValueError(f"{module}.{name} has shape {tuple(found[name])} and should have {wanted[name]}")
