"""Gram matrices: which inputs of a linear layer go together on some data, `X^T X` over the rows X of inputs.

All tokens of the rows count, those of the prompt too, and padding does not. It is the mean over tokens, so that data of
one expert do not outweigh those of another by their length.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modular_experts.data.batch import Batch
from modular_experts.methods.method import DataStatistic

__all__ = ["gram"]


@torch.no_grad()
def gram(model: PreTrainedModel, batches: Iterable[Batch], names: Sequence[str]) -> dict[str, DataStatistic | None]:
    """Return the Gram matrix `(in, in)` of the inputs of each weight's layer, in at least float32.

    A weight that is no matrix of a linear layer (a bias, a norm, an embedding) gives none. In memory are one matrix per
    layer and the inputs of one batch.

    Args:
        model: A causal language model; it is put into evaluation mode for the while.
        batches: As `data/batch.py` says.
        names: The weights.

    Raises:
        ValueError: There is no row, or a layer's inputs are not laid out by row and token, as those of a mixture of
            experts, and the batch has padding.
    """
    layers = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
    directions = {name: _inputs(name, layer) for name, layer in layers.items()}
    sums = _Sums()
    hooked = {name: layer for name, layer in layers.items() if directions[name] is not None}
    handles = [layer.register_forward_pre_hook(partial(sums.take, name)) for name, layer in hooked.items()]
    training = model.training
    try:
        model.eval()
        for batch in batches:
            sums.start(batch["attention_mask"].to(model.device))
            inner = _inner(model, hooked.values())
            inner(batch["input_ids"].to(model.device), attention_mask=sums.mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    if not sums.tokens:
        raise ValueError("Gram matrices need at least one row, and there was none")
    return {name: sums.mean(name, layer, directions[name]) for name, layer in layers.items()}


class _Sums:
    """The running sums of one pass over data."""

    def __init__(self) -> None:
        self.tokens = 0
        self._totals: dict[str, Tensor] = {}

    def start(self, mask: Tensor) -> None:
        self.mask, self.tokens = mask, self.tokens + int(mask.sum())
        self._padded = not bool(mask.all())
        self._last: tuple[Tensor, Tensor] | None = None

    def take(self, name: str, layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        inputs = arguments[0]
        if self._last is None or self._last[0] is not inputs:  # projections of one attention layer share their inputs
            rows = self._rows(name, inputs)
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            self._last = (inputs, rows.T @ rows)
        product = self._last[1]
        if name in self._totals:
            self._totals[name] += product
        else:
            self._totals[name] = product.clone()

    def mean(self, name: str, layer: nn.Module, inputs: int | None) -> DataStatistic | None:
        if inputs is None:
            return None
        weight: Any = layer.weight
        width = weight.shape[inputs]
        total = self._totals.get(name)
        if total is None:  # a layer that no token reached
            total = torch.zeros(width, width, device=weight.device)
        return DataStatistic(total.div_(self.tokens), inputs=inputs)

    def _rows(self, name: str, inputs: Tensor) -> Tensor:
        if not self._padded:
            return inputs.reshape(-1, inputs.shape[-1])
        if inputs.shape[:-1] != self.mask.shape:
            raise ValueError(
                f"{name} gets inputs of shape {tuple(inputs.shape)}, which are not laid out by row and token "
                f"{tuple(self.mask.shape)}, so its padding cannot be left out; give data.eval_batch_size: 1"
            )
        return inputs[self.mask.bool()]


def _inputs(name: str, layer: nn.Module) -> int | None:
    """Return along which dimension of a weight its layer's inputs are; none for what is no matrix of a linear layer."""
    if not name.endswith(".weight"):
        return None
    if isinstance(layer, nn.Linear):
        return 1
    return 0 if type(layer).__name__ == "Conv1D" and hasattr(layer, "nf") else None


def _inner(model: PreTrainedModel, layers: Iterable[nn.Module]) -> nn.Module:
    """Return the part of a model to run: without the head, whose logits would be most of the memory, if it may be."""
    inside = {id(module) for module in model.base_model.modules()}
    return model.base_model if all(id(layer) in inside for layer in layers) else model
