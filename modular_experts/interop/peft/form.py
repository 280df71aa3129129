"""Forms: the kinds of PEFT adapter that an expert can be written as, and what they have in common."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from modular_experts.deltas import Delta

__all__ = ["Carried", "PeftForm", "total_error"]


@dataclass(frozen=True)
class Carried:
    """How an adapter carries one weight.

    Attributes:
        delta: The delta that the adapter stands for.
        tensors: Its tensors, by the last part of their key.
        energy: Squared Frobenius norm of the expert's delta.
        lost: The same of what the adapter lacks of it.
        padding: Entries of value zero that the format asks for and the expert does not have.
    """

    delta: Delta
    tensors: Mapping[str, Tensor]
    energy: float
    lost: float = 0.0
    padding: int = 0

    @property
    def kept_energy(self) -> float:
        """Share of the energy that is carried, in [0, 1]."""
        return 1.0 - self.lost / self.energy if self.energy else 1.0

    @property
    def relative_error(self) -> float:
        """Frobenius norm of what is lost, as a share of that of the delta."""
        return math.sqrt(self.lost / self.energy) if self.energy else 0.0

    def numbers(self) -> dict[str, Any]:
        """Return what a manifest says about the weight."""
        return {
            "form": type(self.delta).__name__,
            "kept": getattr(self.delta, "rank", self.delta.support_size),
            "padding": self.padding,
            "kept_energy": self.kept_energy,
            "relative_error": self.relative_error,
        }


class PeftForm(ABC):
    """A kind of PEFT adapter.

    Attributes:
        peft_type: What PEFT calls it.
        carries: Which modules' weights it can move, in words.
    """

    peft_type: ClassVar[str]
    carries: ClassVar[str]

    @abstractmethod
    def takes(self, module: nn.Module) -> bool:
        """Return whether the weight of this module can be moved."""

    def settle(self, deltas: Iterable[tuple[str, Delta]]) -> PeftForm:
        """Return the form with what is one for all modules, such as a sparsity, chosen for these deltas.

        Raises:
            ValueError: No choice suits them all.
        """
        return self

    @abstractmethod
    def carry(self, name: str, module: nn.Module, delta: Delta) -> Carried:
        """Return a delta as the adapter carries it.

        Raises:
            ValueError: It cannot.
        """

    @abstractmethod
    def configuration(self, modules: Mapping[str, nn.Module], carried: Mapping[str, Carried]) -> dict[str, Any]:
        """Return the fields of `adapter_config.json` that are this form's own."""


def total_error(carried: Mapping[str, Carried]) -> float:
    """Return the relative error of all weights together."""
    energy = sum(weight.energy for weight in carried.values())
    return math.sqrt(sum(weight.lost for weight in carried.values()) / energy) if energy else 0.0
