"""Task vectors: all deltas of one expert, by weight name, each read or made when it is asked for.

What is stored, what is merged and what is summed is used through this one face; only the shapes are known beforehand.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence

import torch

from modular_experts.deltas.forms import Delta, add

__all__ = ["Sum", "TaskVector"]


class TaskVector(Mapping[str, Delta]):
    """A mapping from weight names to deltas. Subclass it with `shapes` and `__getitem__`."""

    @abstractmethod
    def shapes(self) -> dict[str, torch.Size]:
        """Return the shape of each weight that moves, in the order of the names, without reading or making a delta."""

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes())

    def __len__(self) -> int:
        return len(self.shapes())

    def __contains__(self, name: object) -> bool:
        return name in self.shapes()  # what Mapping inherits would make the delta to find out


class Sum(TaskVector):
    """The sum of task vectors, weight by weight, each taken when it is asked for.

    Args:
        vectors: At least one; a weight has one shape in all of them.
    """

    def __init__(self, vectors: Sequence[TaskVector]) -> None:
        self._vectors = vectors
        self._shapes = dict(sorted(item for vector in vectors for item in vector.shapes().items()))

    def __getitem__(self, name: str) -> Delta:
        return add([vector[name] for vector in self._vectors if name in vector])

    def shapes(self) -> dict[str, torch.Size]:
        return self._shapes
