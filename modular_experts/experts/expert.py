"""Define the contract of an expert, which owns the trained state of one site and states its delta."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NoReturn, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modular_experts.deltas import Delta


class Trained(nn.Module):
    """Owns the trained state at one place of a model, in float32 also when the model moves to bfloat16."""

    learning_rate: ClassVar[float] = 1e-3
    """Peak learning rate used with the default optimizer, AdamW."""

    mergeable: ClassVar[bool] = True
    """Whether deltas give all that the expert does. A type whose output depends on the input sets it to False."""

    not_mergeable_because: ClassVar[str] = ""
    """The reason, as the end of a sentence: "its router chooses by the input"."""

    made_by: dict[str, Any] | None = None
    """The class and the settings of the `LayerPlan` that made it."""

    @property
    def moves_tokens_alone(self) -> bool:
        """Whether it looks at no other token than the one that it moves, as each delta does."""
        return self.mergeable

    def before_fit(self, module: Any, data: Any) -> bool:
        """Get ready for a training that begins, alike in every process; return whether that took work.

        Args:
            module: The `ExpertModule`, with its `model` on its device; the expert may replace its `batch_losses`.
            data: The trainer's data module, or None.
        """
        return False

    def draw(self, key: str) -> None:
        """Draw what is random in the next training step, for all of its micro-batches; most types draw nothing.

        Args:
            key: Names seed, step and place: `random.Random(key)` gives the same numbers on all ranks, and again in a
                resumed run.
        """

    def extra_loss(self) -> dict[str, Tensor]:
        """Return terms, by name, that are added to the training loss; training asks once after each forward pass.

        It logs the sum of a name over all experts as `penalty/<name>`.
        """
        return {}

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that the library keeps beside, or instead of, the delta; `load_state_dict` takes them.

        Override it where the trained form of a mergeable type is smaller than the delta.
        """
        return {} if self.mergeable else dict(self.state_dict())

    def settings(self) -> dict[str, bool | int | float | str]:
        """Return the plain values that the expert was made with, for its record."""
        plain = {name: value for name, value in vars(self).items() if isinstance(value, bool | int | float | str)}
        return {name: value for name, value in plain.items() if not name.startswith("_") and name != "training"}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if not tensor.is_floating_point() or moved.dtype == tensor.dtype:
                return moved
            return tensor.to(moved.device, torch.promote_types(tensor.dtype, moved.dtype))

        return super()._apply(keep_precision, recurse)


class Expert(Trained, ABC):
    """Owns the trained state of one linear layer; a subclass must give `__init__(weight, ...)` and `delta`."""

    @property
    def delta_of_base(self) -> bool:
        """Whether the delta is made of weights of the base, so that it changes with other experts in them."""
        return False

    @abstractmethod
    def delta(self, weight: Tensor, anchor: Callable[[], Tensor]) -> Delta:
        """Return how far the weight has moved from the base.

        Args:
            weight: The layer's weight as it is now, `(out, in)`.
            anchor: Gives the weight as it was before training, `(out, in)`; it may read a file, so call it only when
                needed.

        Raises:
            NotImplementedError: The type is not mergeable.
        """

    def bias_delta(self, bias: Tensor, weight: Tensor) -> Delta | None:
        """Return how far the bias has moved from the base, or None for an expert that leaves it alone.

        The layer's bias itself stays frozen, and `forward` adds the change. Exports and merges treat it as the weight
        `<name>.bias`.

        Args:
            bias: The layer's bias `(out,)`, as it was before training.
            weight: The layer's weight as it is now, `(out, in)`.
        """
        return None

    def size_like(self, weight: Tensor, state: Mapping[str, Tensor]) -> None:
        """Take the sizes of the tensors of a checkpoint, which is loaded next; most types have fixed sizes.

        Args:
            weight: The layer's weight `(out, in)`.
            state: This expert's part of the checkpoint, by the names of its parameters and buffers.
        """

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the layer's output `(..., out)` for `x` `(..., in)`; here base and delta side by side."""
        delta = self.delta(weight, lambda: weight)
        if not isinstance(delta, Delta):
            name = type(self).__name__
            raise TypeError(f"{name}.delta must return a delta, got a {type(delta).__name__}; wrap a tensor in Dense")
        out = F.linear(x, weight, bias) + delta.linear(x)
        moved = None if bias is None else self.bias_delta(bias, weight)
        return out if moved is None else out + moved.dense().to(out.dtype)


class NotMergeable:
    """A base class beside `Expert` for types that no delta can state; they give `not_mergeable_because`."""

    mergeable: ClassVar[bool] = False
    not_mergeable_because: ClassVar[str]

    def delta(self, weight: Tensor, anchor: Callable[[], Tensor]) -> NoReturn:
        raise NotImplementedError(f"{type(self).__name__} has no delta: {self.not_mergeable_because}")


class InPlaceExpert(Expert):
    """Writes what it trains into the layer's own weight; a subclass gives `restore` beside `delta`."""

    trains_weight: ClassVar[bool] = False
    """Whether the weight itself is a trained parameter (in float32), as for a full fine-tune."""
    takes_transient: ClassVar[bool] = False
    """Whether it leaves a `TransientWeight` as it is, and adds what it trains whenever the weight is read."""

    def write(self, weight: Tensor) -> None:
        """Bring the weight up to date with the trained state; a trained weight is so at any time."""

    def moved(self, weight: Tensor) -> Tensor:
        """Return the weight, which holds the trained state, so that its gradient reaches what is trained.

        A base calls it that uses the weight in another way than a linear layer does, such as an embedding.

        Raises:
            NotImplementedError: The type does not give it.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `moved`, which an embedding or a bias needs")

    @abstractmethod
    def restore(self, weight: Tensor, anchor: Callable[[], Tensor]) -> None:
        """Give the weight back as it was before training, bit for bit; `anchor` reads that weight."""

    def reanchor(self, weight: Tensor) -> None:
        """Take the weight as it is now, which holds no trained state, for the base."""


def trains_weight(expert: Expert) -> bool:
    """Return whether an expert trains the layer's own weight."""
    return isinstance(expert, InPlaceExpert) and expert.trains_weight


ExpertFactory = Callable[[Tensor], Expert]
"""Makes an expert for a weight: a type, or a `partial` of one with settings."""


def title_of(factory: ExpertFactory) -> str:
    """Return the name of a type of expert, with the settings that a `partial` gives it beside their defaults."""
    # The parser of the command line makes a partial of a function of its own, whose argument is the type.
    parts = [getattr(factory, "func", factory), *getattr(factory, "args", ())]
    kind = next((part for part in reversed(parts) if isinstance(part, type)), parts[0])
    defaults = {name: known.default for name, known in inspect.signature(kind).parameters.items()}
    given = getattr(factory, "keywords", {})
    settings = ", ".join(f"{name}={value}" for name, value in given.items() if value != defaults.get(name))
    return f"{kind.__name__}({settings})" if settings else str(kind.__name__)
