"""An in-place expert writes what it trains into the layer's own weight, so that the forward pass is the base's."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from modular_experts.experts.expert import Expert


class InPlaceExpert(Expert):
    """An expert whose trained state is in the weight; a subclass gives `restore` beside `delta`."""

    trains_weight: ClassVar[bool] = False
    """Whether the weight itself is a trained parameter (in float32), as for a full fine-tune."""

    def write(self, weight: Tensor) -> None:
        """Bring the weight up to date with the trained state; a trained weight is so at any time."""

    @abstractmethod
    def restore(self, weight: Tensor, anchor: Callable[[], Tensor]) -> None:
        """Give the weight back as it was before training, bit for bit; `anchor` reads that weight."""

    def reanchor(self, weight: Tensor) -> None:
        """Take the weight as it is now, which holds no trained state, for the base."""


def trains_weight(expert: Expert) -> bool:
    """Return whether an expert trains the layer's own weight."""
    return isinstance(expert, InPlaceExpert) and expert.trains_weight
