"""Measure the diagonal of the Fisher information: the mean over rows of the squared gradient of a row's log-likelihood.

The targets are the data's own (the "empirical" Fisher information).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modular_experts.base.structure import split_slice, weight_of
from modular_experts.data.batch import IGNORED, Batch
from modular_experts.evaluation.likelihood import batch_losses
from modular_experts.methods.method import DataStatistic
from modular_experts.routing.prompts import evaluation_mode


def fisher(model: PreTrainedModel, batches: Iterable[Batch], names: Sequence[str]) -> dict[str, DataStatistic]:
    """Return the mean squared gradient of each weight, of its shape, in at least float32; each row costs a pass.

    The model has the expert applied, and is in evaluation mode meanwhile; rows without a labelled token are left out.
    """
    sums: dict[str, Tensor] = {}
    parts: dict[str, dict[int | None, Tensor]] = {}
    for name in names:
        weight = weight_of(model, name)
        whole, number = split_slice(name)
        sums[name] = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        parts.setdefault(whole, {})[number] = sums[name]
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    rows = 0
    handles = []
    model.requires_grad_(False)
    try:
        for whole, totals in parts.items():
            parameter = model.get_parameter(whole).requires_grad_(True)
            handles.append(parameter.register_post_accumulate_grad_hook(partial(_add_squares, totals)))
        with evaluation_mode(model):
            for batch in batches:
                for row in _rows(batch, model.device):
                    batch_losses(model, row)[0].sum().backward()
                    rows += 1
    finally:
        for handle in handles:
            handle.remove()
        for parameter, required in before.items():
            parameter.requires_grad_(required)
    if not rows:
        raise ValueError("Fisher information needs at least one row with a target, and there was none")
    return {name: DataStatistic(total.div_(rows)) for name, total in sums.items()}


def _add_squares(totals: Mapping[int | None, Tensor], weight: Tensor) -> None:
    """Add the squares of a parameter's gradient to its total, or the squares of its slices' gradients to theirs."""
    assert weight.grad is not None
    for number, total in totals.items():
        gradient = (weight.grad if number is None else weight.grad[number]).to(total.dtype)
        total.addcmul_(gradient, gradient)
    weight.grad = None


def _rows(batch: Batch, device: torch.device) -> Iterator[Batch]:
    """Yield each row with a labelled token as a batch of its own, without padding."""
    for number, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        row = {key: batch[key][number : number + 1, :length] for key in ("input_ids", "attention_mask", "labels")}
        if (row["labels"] != IGNORED).any():
            moved = {key: tensor.to(device) for key, tensor in row.items()}
            yield moved | {"task": batch["task"][number : number + 1]} if "task" in batch else moved
