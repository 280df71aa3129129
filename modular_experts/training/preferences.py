"""Train experts on preferences: rows with a chosen and a rejected answer. The reference is the model at its start.

Every expert kind trains so: for the reference, all that it trains is set back to its start for one pass without
gradients, which costs a forward pass and a second copy of the trained numbers.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modular_experts.data.batch import Batch
from modular_experts.evaluation.likelihood import batch_losses
from modular_experts.experts.expert import InPlaceExpert
from modular_experts.injection import named_experts, write_experts
from modular_experts.routing.prompts import evaluation_mode

Start = Mapping[str, Tensor]


class PreferenceLoss(ABC):
    """A loss of the margins by which a model prefers chosen to rejected answers more than its reference does."""

    @abstractmethod
    def of(self, margins: Tensor) -> Tensor:
        """Return the loss of each pair, `(pairs,)`, from `log p(chosen) - log p(rejected)` over the reference's."""

    def batch_losses(self, start: Start, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return each row's sum over pairs, of its target with each other choice, and their number, both `(rows,)`.

        Args:
            start: What `start_of` returned.
            model: The model with experts.
            batch: A batch whose rows have `choices`, as a row with a rejected answer has.

        Raises:
            ValueError: The rows of a task have no choices.
        """
        choices = batch.get("choices")
        count = len(batch["task"])
        there = set(choices["row"].tolist()) if choices else set()
        lacking = [task for row, task in enumerate(batch["task"]) if task and row not in there]
        if lacking:
            raise ValueError(
                f"{type(self).__name__} learns preferences, and rows of {lacking[0]} have none; give rows of prompt, "
                "chosen and rejected, or of input, target and choices"
            )
        if choices:
            owners = choices["row"]
            correct = choices["correct"]
            both = {key: choices[key] for key in ("input_ids", "attention_mask", "labels")}
            both["task"] = [batch["task"][row] for row in owners.tolist()]
        else:
            # A batch of filler rows takes the same passes, in step with other processes, and has no pair.
            owners = torch.arange(count)
            correct = torch.ones(count, dtype=torch.bool)
            both = batch
        # First the reference, because experts that lie in the weights write into them.
        with at_start(model, start):
            reference = batch_losses(model, both)[0]
        gains = reference - batch_losses(model, both)[0]
        owners = owners.to(gains.device)
        correct = correct.to(gains.device)
        chosen = gains.new_zeros(count).index_add(0, owners[correct], gains[correct])
        # Each rejected choice makes a pair with its row's chosen one.
        pairs = owners[~correct]
        losses = self.of(chosen[pairs] - gains[~correct])
        sums = losses.new_zeros(count).index_add(0, pairs, losses)
        return sums, torch.bincount(pairs, minlength=count)


@dataclass(frozen=True)
class DPO(PreferenceLoss):
    """Direct preference optimisation (arXiv 2305.18290), `-log sigmoid(beta * margin)`.

    Args:
        beta: How strongly the model is held to the reference; less lets it move further.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.beta < float("inf"):
            raise ValueError(f"beta={self.beta} must be a positive number, such as 0.1")

    def of(self, margins: Tensor) -> Tensor:
        return -F.logsigmoid(self.beta * margins)


def start_of(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all that training changes, by name, before anything is trained or read from a checkpoint."""
    return {name: tensor.detach().clone() for name, tensor in _changed(model).items()}


@contextmanager
def at_start(model: nn.Module, start: Start) -> Iterator[None]:
    """Set a model with experts back to its start while the context is open, without gradients and dropout."""
    changed = _changed(model)
    now = {name: tensor.data for name, tensor in changed.items()}
    with torch.no_grad(), evaluation_mode(model):
        try:
            for name, tensor in changed.items():
                # Values in the weight, whose number a schedule has changed, started at zero.
                is_resized = tensor.requires_grad and start[name].shape != tensor.shape
                tensor.data = torch.zeros_like(tensor) if is_resized else start[name].to(tensor.data)
            write_experts(model)
            yield
        finally:
            for name, tensor in changed.items():
                tensor.data = now[name]
            write_experts(model)


def _changed(model: nn.Module) -> dict[str, Tensor]:
    """Return trained parameters, and buffers of experts beside the weight, such as sums of earlier rounds."""
    changed: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            changed[name] = parameter
    for place, expert in named_experts(model):
        # The places of entries in a weight belong to the base's entries there, which stay.
        if not isinstance(expert, InPlaceExpert):
            changed |= {f"{place}/{name}": buffer for name, buffer in expert.named_buffers()}
    return changed
