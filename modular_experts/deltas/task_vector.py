"""A task vector maps weight names to the deltas of one expert, and reads or makes each when somebody needs it.

Stored experts, merges and sums all have this one face. `a + b`, `a - b` and `0.5 * a` are task vectors too.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

import modular_experts
from modular_experts.deltas.forms import Delta, add


class TaskVector(Mapping[str, Delta]):
    """A mapping from weight names to deltas. Subclass it with `shapes` and `__getitem__`."""

    noted: dict[str, Any] | None = None
    """What lookups find beside the deltas, if anything; a write that goes on after an interruption gets it back."""

    @abstractmethod
    def shapes(self) -> dict[str, torch.Size]:
        """Return the shape of each weight that moves, in the order of the names, without reading or making a delta."""

    @property
    def not_mergeable_because(self) -> str | None:
        """Why the deltas do not say all that the expert does, as the end of a sentence; None where they do."""
        return None

    def terms(self) -> Sequence[TaskVector]:
        """Return the task vectors that this one is made of; none for one that stands alone."""
        return ()

    def leaves(self) -> list[TaskVector]:
        """Return the task vectors at the ends of the tree of terms; of one that stands alone, itself."""
        return [leaf for term in self.terms() for leaf in term.leaves()] if self.terms() else [self]

    @property
    def title(self) -> str:
        """What it is called: a name, or an expression such as `0.5 * a + b`."""
        return type(self).__name__

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.title})"

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes())

    def __len__(self) -> int:
        return len(self.shapes())

    def __contains__(self, name: object) -> bool:
        return name in self.shapes()  # what Mapping inherits would make the delta to find out

    def __add__(self, other: TaskVector) -> Sum:
        return Sum([self, other])

    def __sub__(self, other: TaskVector) -> Sum:
        return Sum([self, -other])

    def __mul__(self, factor: float) -> Scaled:
        return Scaled(self, factor)

    __rmul__ = __mul__

    def __neg__(self) -> Scaled:
        return Scaled(self, -1.0)

    def apply_to(self, model: torch.nn.Module, scale: float = 1.0, check: bool = True) -> Any:
        """Add all deltas to a loaded model; return a handle whose `remove()` makes it what it was, bit for bit.

            with expert.apply_to(model, scale=0.5):
                model.generate(...)

        Args:
            model: The base, before experts are injected.
            scale: Factor of the deltas.
            check: For library experts, check that the model is the base that they were trained on.

        Raises:
            ValueError: The model does not have one of the weights, or is not the base.
        """
        # Through the front door: bases are built on task vectors, so no module here can import them.
        return modular_experts.applied(model, self, scale, check)


class Sum(TaskVector):
    """The sum of task vectors, weight by weight; a weight has one shape in all of them."""

    def __init__(self, vectors: Sequence[TaskVector]) -> None:
        self.vectors = [_mergeable(vector) for vector in vectors]
        shapes: dict[str, torch.Size] = {}
        for vector in self.vectors:
            for name, shape in vector.shapes().items():
                if shapes.setdefault(name, shape) != shape:
                    two = f"{tuple(shapes[name])} and {tuple(shape)}"
                    raise ValueError(f"the task vectors disagree on the shape of {name}: {two}")
        self._shapes = dict(sorted(shapes.items()))

    def __getitem__(self, name: str) -> Delta:
        return add([vector[name] for vector in self.vectors if name in vector])

    def terms(self) -> Sequence[TaskVector]:
        return self.vectors

    @property
    def title(self) -> str:
        return " + ".join(vector.title for vector in self.vectors)

    def shapes(self) -> dict[str, torch.Size]:
        return self._shapes


class Scaled(TaskVector):
    """A task vector times a number, weight by weight."""

    def __init__(self, vector: TaskVector, factor: float) -> None:
        self.vector = _mergeable(vector)
        self.factor = factor

    def __getitem__(self, name: str) -> Delta:
        return self.vector[name] * self.factor

    def terms(self) -> Sequence[TaskVector]:
        return [self.vector]

    @property
    def title(self) -> str:
        inner = self.vector.title
        return f"{self.factor!r} * ({inner})" if isinstance(self.vector, Sum) else f"{self.factor!r} * {inner}"

    def shapes(self) -> dict[str, torch.Size]:
        return self.vector.shapes()


def _mergeable(vector: TaskVector) -> TaskVector:
    if reason := vector.not_mergeable_because:
        raise ValueError(f"{vector!r} cannot be added or scaled, because {reason}")
    return vector
