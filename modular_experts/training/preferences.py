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
        choices, count = batch.get("choices"), len(batch["task"])
        there = set(choices["row"].tolist()) if choices else set()
        if lacking := [task for row, task in enumerate(batch["task"]) if task and row not in there]:
            raise ValueError(
                f"{type(self).__name__} learns preferences, and rows of {lacking[0]} have none; give rows of prompt, "
                "chosen and rejected, or of input, target and choices"
            )
        if choices:
            owners, correct = choices["row"], choices["correct"]
            both = {key: choices[key] for key in ("input_ids", "attention_mask", "labels")}
            both["task"] = [batch["task"][row] for row in owners.tolist()]
        else:
            # A batch of filler rows takes the same passes, in step with other processes, and has no pair.
            owners, correct = torch.arange(count), torch.ones(count, dtype=torch.bool)
            both = batch
        # First the reference, because experts that lie in the weights write into them.
        with at_start(model, start):
            reference = batch_losses(model, both)[0]
        gains = reference - batch_losses(model, both)[0]
        owners, correct = owners.to(gains.device), correct.to(gains.device)
        chosen = gains.new_zeros(count).index_add(0, owners[correct], gains[correct])
        losses, owners = self.of(chosen[owners[~correct]] - gains[~correct]), owners[~correct]
        sums = losses.new_zeros(count).index_add(0, owners, losses)
        return sums, torch.bincount(owners, minlength=count)


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
    return {name: one.detach().clone() for name, one in _changed(model).items()}


@contextmanager
def at_start(model: nn.Module, start: Start) -> Iterator[None]:
    """Set a model with experts back to its start while the context is open, without gradients and dropout."""
    changed = _changed(model)
    now = {name: one.data for name, one in changed.items()}
    with torch.no_grad(), evaluation_mode(model):
        try:
            for name, one in changed.items():
                # Values in the weight, whose number a schedule has changed, started at zero.
                is_resized = one.requires_grad and start[name].shape != one.shape
                one.data = torch.zeros_like(one) if is_resized else start[name].to(one.data)
            write_experts(model)
            yield
        finally:
            for name, one in changed.items():
                one.data = now[name]
            write_experts(model)


def _changed(model: nn.Module) -> dict[str, Tensor]:
    """Return trained parameters, and buffers of experts beside the weight, such as sums of earlier rounds."""
    found: dict[str, Tensor] = {name: one for name, one in model.named_parameters() if one.requires_grad}
    for place, expert in named_experts(model):
        if not isinstance(expert, InPlaceExpert):  # whose places of entries and base entries belong together
            found |= {f"{place}/{name}": one for name, one in expert.named_buffers()}
    return found
