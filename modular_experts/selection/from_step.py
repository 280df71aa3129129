"""Choose supports from the gradient of a training step that is made anyway, inside of its backward pass.

While a support is due, a `_Chooser` takes the place of the layer's kernel. Backward hands it the dense gradient of the
weight; it ranks the entries by it, and gives the gradient of the chosen entries in the place of the present ones. When
backward is over, `MaskSchedule` moves the values to the chosen entries, and the optimizer steps.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from modular_experts.native.kernel import KeptGradient
from modular_experts.selection.choice import SelectableLayer, SupportChoice, statistic_of
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

    choice: SupportChoice
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
            # A sum over micro-batches is float32.
            needed = 4 * layer.expert.shape.numel()
            sums = self.parts > 1 and needed <= left
            if sums:
                left -= needed
            layer.expert.chooser = _Chooser(self, name, layer, sums)

    def next_part(self, is_last: bool) -> None:
        """Say that another micro-batch begins, and whether the optimizer steps after it."""
        self.part += 1
        self.is_last = is_last
        for chooser in self._choosers():
            # Gradient checkpointing reaches layers once more in the backward pass.
            chooser.is_reached = False

    def agree_on_reached(self) -> None:
        """Let layers that a micro-batch reaches on some ranks alone wait; call this between forward and backward.

        The matrices of a mixture of experts are such layers. Ranks reduce a gradient together, or none of them does.
        """
        choosers = self._choosers()
        for chooser in reached_by_some(choosers, self.reduce, choosers[0].units.device):
            # A layer that sums chooses at the last micro-batch, and another one at the first that reaches it.
            if self.is_last or not chooser.sums:
                chooser.waits = True

    def _choosers(self) -> list["_Chooser"]:
        return [cast(_Chooser, layer.expert.chooser) for layer in self.choice.layers.values()]

    def finish(self) -> tuple[dict[str, Tensor], list[str]]:
        """Give the layers their kernels back; return the units to keep of each, and the names of layers without any.

        A layer that no token reached on a rank, or whose gradient overflowed, has none.
        """
        for chooser in self._choosers():
            chooser.layer.expert.chooser = None
            if chooser.hook is not None:
                chooser.hook.remove()
        chosen = self.choice.chosen
        return chosen, [name for name in self.choice.layers if name not in chosen]


class _Chooser(KeptGradient):
    """Takes the place of one layer's kernel until its support is chosen.

    Attributes:
        sums: Whether it adds up the gradients of all micro-batches, and chooses at the last one.
        total: The gradient so far: of all micro-batches if it `sums`, else of this one.
        hook: Lets autograd call `_replace`, from the first gradient on.
        is_reached: Whether the forward pass of the micro-batch at hand came to the layer.
        waits: Whether it chooses nothing in this step, because some ranks alone reached the layer.
    """

    name = "chooser"

    def __init__(self, step: StepChoice, name: str, layer: SelectableLayer, sums: bool) -> None:
        expert = layer.expert
        super().__init__(expert.support_units(), expert.shape, expert.tile)
        self.step = step
        self.weight = name
        self.layer = layer
        self.sums = sums
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
        # `units` are the present ones until `_choose` replaces them.
        kept = super().of_dense(gradient)
        if not self.waits and self.weight not in self.step.choice.chosen:
            # A layer that the model calls twice comes here twice in one backward pass.
            self.total = gradient if self.total is None else self.total.add_(gradient)
            values = self.layer.expert.packed
            if self.hook is None and values is not None:
                # Autograd calls it when the values have their gradient from all calls of the layer in this pass.
                self.hook = values.register_hook(functools.partial(self._replace, values))
        return kept

    @torch.no_grad()
    def _replace(self, values: nn.Parameter, of_present: Tensor) -> Tensor | None:
        """Choose, and return the gradient of the chosen units; or None, which leaves the gradient of the present."""
        started = time.perf_counter()
        step = self.step
        total = self.total
        if self.waits or total is None or (self.sums and not step.is_last):
            return None
        self.total = None
        kept = self._choose(step.reduce(total))
        if self.sums and values.grad is not None:
            # What earlier micro-batches gave the present units is a part of the sum, which `kept` is read from.
            values.grad.zero_()
        step.seconds += time.perf_counter() - started
        return kept.to(of_present.dtype)

    def _choose(self, gradient: Tensor) -> Tensor:
        """Choose units by a gradient of the weight, of all ranks; return the gradient of the chosen units."""
        step = self.step
        choice = step.choice
        if step.loss_scale is not None and not bool(gradient.isfinite().all()):
            return torch.full_like(super().of_dense(gradient), torch.inf)
        # Scores get the mean gradient of the micro-batches that it sums, as if the loss had neither been divided by
        # their number nor scaled.
        summed = step.part if self.sums else 1
        factor = step.parts / summed / (step.loss_scale or 1.0)
        statistic = gradient if factor == 1 else gradient * factor
        # torch counts writes into a tensor; a score that wrote into this one would change the training.
        version = gradient._version
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
