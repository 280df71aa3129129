"""Define the contract of an expert, which owns the trained state of one site and states its delta.

Read this file to write a type of your own; `ia3.py` in the tests is one in thirty lines. *Additive* experts (LoRA, most
user types) own parameters beside a frozen weight. *In-place* experts (sparse, full) train the weight itself.
`injection` puts experts into the layers of a model. What is trained at another module than a linear layer is a
`ModuleExpert` (`module_expert.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NoReturn, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modular_experts.deltas import Delta


class Trained(nn.Module):
    """Owns what is trained at one place of a model; `Expert` and `ModuleExpert` are the two kinds.

    Parameters and buffers move between devices with the model but never lose precision: a float32 parameter stays
    float32 beside a bfloat16 base, so that small updates are not rounded away.
    """

    learning_rate: ClassVar[float] = 1e-3
    """Peak learning rate used with the default optimizer, AdamW."""

    mergeable: ClassVar[bool] = True
    """Whether deltas give all that the expert does. A type whose output depends on the input sets it to False."""

    not_mergeable_because: ClassVar[str] = ""
    """The reason, as the end of a sentence: "its router chooses by the input"."""

    penalty_name: ClassVar[str] = ""
    """The name by which training logs the penalty, as `penalty/<name>`; the name of the type if empty."""

    made_by: dict[str, Any] | None = None
    """The class and the settings of the `LayerPlan` that the expert was made by, which `inject` notes here."""

    consistency: float = 0.0
    """Weight of the divergence between two predictions of each training token, for types that draw at random.

    If it is not 0, a batch of training holds each row twice, all first copies before all second ones.
    """

    @property
    def moves_tokens_alone(self) -> bool:
        """Whether it looks at no other token than the one that it moves: what is a delta does not, others may."""
        return self.mergeable

    def draw(self, key: str) -> None:
        """Draw what is random in the next training step; most types draw nothing.

        Gradient checkpointing repeats a forward pass, which must not draw anew; nor must the micro-batches of a step.

        Args:
            key: Names seed, step and place: `random.Random(key)` gives the same numbers on all ranks, and again in a
                resumed run.
        """

    def penalty(self) -> Tensor | None:
        """Return a term that is added to the training loss, or None; training asks once after each forward pass."""
        return None

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that the library keeps beside, or instead of, the delta.

        Here every parameter and buffer of a type that is not mergeable, and nothing for others, whose delta holds all.
        Override it where the trained form is smaller than the delta, and `load_state` with it.
        """
        return {} if self.mergeable else dict(self.state_dict())

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` returned, in an expert made with the same settings.

        Raises:
            RuntimeError: A tensor is missing, has nowhere to go, or has another shape.
        """
        self.load_state_dict(dict(state))

    def settings(self) -> dict[str, bool | int | float | str]:
        """Return the plain values that the expert was made with, for its record and for the summary of a run."""
        plain = {name: value for name, value in vars(self).items() if isinstance(value, bool | int | float | str)}
        return {name: value for name, value in plain.items() if not name.startswith("_") and name != "training"}

    def refer(self, **others: nn.Module) -> None:
        """Keep modules that another expert owns as attributes of these names, so that their tensors exist once."""
        # `nn.Module.__setattr__` would register them.
        for name, module in others.items():
            object.__setattr__(self, name, module)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if not tensor.is_floating_point() or moved.dtype == tensor.dtype:
                return moved
            return tensor.to(moved.device, torch.promote_types(tensor.dtype, moved.dtype))

        return super()._apply(keep_precision, recurse)


class Expert(Trained, ABC):
    """Owns the trained state of one linear layer; a subclass must give `__init__(weight, ...)` and `delta`."""

    trains_weight: ClassVar[bool] = False
    """Whether the layer's own weight is a trained parameter (in float32), as for a full fine-tune."""

    leave_bias: ClassVar[str] = "take a type of expert that leaves the bias alone"
    """What to do so that the bias stays, as the end of a sentence, for a type that moves it in a layer without one."""

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

        The layer's bias itself stays frozen: the expert keeps its change beside it, and `forward` adds it. Exports and
        merges treat it as the weight `<name>.bias`.

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
        out = F.linear(x, weight, bias) + self.delta(weight, lambda: weight).linear(x)
        moved = None if bias is None else self.bias_delta(bias, weight)
        return out if moved is None else out + moved.dense().to(out.dtype)

    def write(self, weight: Tensor) -> None:
        """Bring the layer's weight up to date with the trained state; additive experts have nothing to do."""

    def restore(self, weight: Tensor, anchor: Callable[[], Tensor]) -> None:
        """Give the layer's weight back as it was before training, bit for bit; additive experts never changed it."""

    def reanchor(self, weight: Tensor) -> None:
        """Take the weight as it is now, which holds no trained state, for the base; additive experts do so anyway."""


def zero_gradients(out: Tensor, expert: Expert) -> Tensor:
    """Return the output of a layer, so that a backward pass gives all parameters of its expert a gradient, if of zero.

    DDP waits for the gradient of each parameter, also of one that a step leaves out.
    """
    idle = sum((0 * parameter.flatten()[0] for parameter in expert.parameters()), start=out.new_zeros(()))
    return out + idle.to(out.dtype)


class NotMergeable:
    """A base class beside `Expert` for types that no delta can state; they give `not_mergeable_because`."""

    mergeable: ClassVar[bool] = False
    not_mergeable_because: ClassVar[str]

    def delta(self, weight: Tensor, anchor: Callable[[], Tensor]) -> NoReturn:
        raise NotImplementedError(f"{type(self).__name__} has no delta: {self.not_mergeable_because}")
