"""Choose supports from the gradient of a training step that is made anyway, inside of its backward pass."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from modular_experts.native.kernel import KeptGradient
from modular_experts.selection.choice import Choice, SelectableLayer, statistic_of
from modular_experts.selection.scoring import reached_by_some


@dataclass
class StepChoice:
    """Chooses the supports of packed experts within one optimizer step; the caller then moves the experts to them.

    With several micro-batches, gradients are summed over them in the memory of `budget`, and the last micro-batch
    chooses. A layer beyond the budget chooses at the first micro-batch, and the others give the gradient of the chosen
    units. Either way the gradient is exactly the sum over all micro-batches.

    Args:
        choice: Ranks and chooses; its layers all have packed experts.
        parts: Micro-batches of the step; each one's gradient is divided by this number already.
        budget: Bytes that accumulators may take, if there are several micro-batches.
        reduce: Averages a gradient over ranks.
        agree: Returns the first rank's units on every rank.
        loss_scale: The factor by which a GradScaler multiplied the loss, or None without one. With one, a layer whose
            gradient is not finite chooses nothing: its gradient becomes infinite, so that the scaler skips the step.
        seconds: What the dense gradients and the choices took.
        part: The number of the micro-batch at hand, from 1.
        is_last: Whether the micro-batch at hand is the step's last.
    """

    choice: Choice
    parts: int = 1
    budget: int = 2**30
    reduce: Callable[[Tensor], Tensor] = lambda gradient: gradient
    agree: Callable[[Tensor], Tensor] = lambda units: units
    loss_scale: float | None = None
    seconds: float = 0.0
    part: int = 0
    is_last: bool = False

    def __post_init__(self) -> None:
        left = self.budget
        for name, layer in self.choice.layers.items():
            needed = 4 * layer.expert.shape.numel()
            sums = self.parts > 1 and needed <= left
            left -= needed if sums else 0
            layer.expert.chooser = _Chooser(self, name, layer, sums)

    def next_part(self, is_last: bool) -> None:
        """Say that another micro-batch begins, and whether the optimizer steps after it."""
        self.part, self.is_last = self.part + 1, is_last
        for one in self._choosers():
            # Gradient checkpointing reaches layers once more in the backward pass.
            one.is_reached = False

    def agree_on_reached(self) -> None:
        """Let the layers wait that a micro-batch reaches on some ranks alone; call it between its two passes.

        Such as the matrices of a mixture of experts: ranks reduce a gradient together, or none of them does.
        """
        choosers = self._choosers()
        for one in reached_by_some(choosers, self.reduce, choosers[0].units.device):
            # A layer that sums chooses at the last micro-batch, and another one at the first that reaches it.
            one.waits |= self.is_last or not one.sums

    def _choosers(self) -> list["_Chooser"]:
        return [cast(_Chooser, layer.expert.chooser) for layer in self.choice.layers.values()]

    def finish(self) -> tuple[dict[str, Tensor], list[str]]:
        """Give the layers their kernels back; return the units to keep of each, and the names of those without any.

        A layer that no token reached on a rank, or whose gradient overflowed, has none.
        """
        for one in self._choosers():
            one.layer.expert.chooser = None
            if one.hook is not None:
                one.hook.remove()
        chosen = self.choice.chosen
        return chosen, [name for name in self.choice.layers if name not in chosen]


class _Chooser(KeptGradient):
    """Takes the place of one layer's kernel until its support is chosen."""

    name = "chooser"

    def __init__(self, step: StepChoice, name: str, layer: SelectableLayer, sums: bool) -> None:
        expert = layer.expert
        super().__init__(expert.support_units(), expert.shape, expert.tile)
        self.step, self.weight, self.layer, self.sums = step, name, layer, sums
        self.total: Tensor | None = None
        self.hook: RemovableHandle | None = None
        self.is_reached = self.waits = False

    def saved(self, x: Tensor) -> Tensor:
        self.is_reached = True
        return x

    @torch.no_grad()
    def gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        started = time.perf_counter()
        kept = super().gradient(x, grad)
        self.step.seconds += time.perf_counter() - started
        return kept

    def of_dense(self, gradient: Tensor) -> Tensor:
        """Add up the gradient of one call of the layer; return the gradient of the present, or of the chosen units."""
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        kept = super().of_dense(gradient)
        if not self.waits and self.weight not in self.step.choice.chosen:
            self.total = gradient if self.total is None else self.total.add_(gradient)
            if self.hook is None and (values := self.layer.expert.packed) is not None:
                # Autograd calls it when the values have their gradient from all calls of the layer in this pass.
                self.hook = values.register_hook(functools.partial(self._replace, values))
        return kept

    @torch.no_grad()
    def _replace(self, values: nn.Parameter, of_present: Tensor) -> Tensor | None:
        """Choose, and return the gradient of the chosen units; or None, which leaves the gradient of the present."""
        started, step, total = time.perf_counter(), self.step, self.total
        if self.waits or total is None or (self.sums and not step.is_last):
            return None
        self.total, kept = None, self._choose(step.reduce(total))
        if self.sums and values.grad is not None:
            values.grad.zero_()  # of the present units, in whose place the new ones come
        step.seconds += time.perf_counter() - started
        return kept.to(of_present.dtype)

    def _choose(self, gradient: Tensor) -> Tensor:
        step, choice = self.step, self.step.choice
        if step.loss_scale is not None and not bool(gradient.isfinite().all()):
            return torch.full_like(super().of_dense(gradient), torch.inf)
        # Scores get the mean gradient of the micro-batches, as if the loss had no factor.
        factor = step.parts / (step.part if self.sums else 1) / (step.loss_scale or 1.0)
        statistic, version = gradient if factor == 1 else gradient * factor, gradient._version
        if statistic_of(self.layer.expert, choice.score) == "squared_gradient":
            statistic = statistic.square()
        device = self.layer.matrix.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            choice.receive(self.weight, statistic)
        if gradient._version != version:
            raise ValueError(
                "the score changed the gradient that it was given, and training needs it; let it return a new tensor"
            )
        self.units = choice.chosen[self.weight] = step.agree(choice.chosen[self.weight])
        return super().of_dense(gradient)
