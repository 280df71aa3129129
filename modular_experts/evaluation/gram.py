"""Measure Gram matrices: `X^T X` over the inputs X `(tokens, in)` of a linear layer, as a mean over all tokens."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modular_experts.base.structure import is_transposed
from modular_experts.data.batch import Batch
from modular_experts.methods.method import DataStatistic


@torch.no_grad()
def gram(model: PreTrainedModel, batches: Iterable[Batch], names: Sequence[str]) -> dict[str, DataStatistic | None]:
    """Return the Gram matrix `(in, in)` of the inputs of each weight's layer, in at least float32; None for a weight
    that is not the matrix of a linear layer.

    Args:
        model: A causal language model; it is in evaluation mode while it is measured.
        batches: Batches as `data/batch.py` describes them.
        names: The weights.

    Raises:
        ValueError: There is no row; or the batch has padding, and a layer's inputs are not laid out by row and token,
            as in a mixture of experts.
    """
    layers = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
    inputs = {name: _inputs(name, layer) for name, layer in layers.items()}
    hooked = {name: layer for name, layer in layers.items() if inputs[name] is not None}
    sums = _Sums()
    handles = [layer.register_forward_pre_hook(partial(sums.take, name)) for name, layer in hooked.items()]
    # Without the head, unless it is measured, because logits take most memory.
    inside = {id(module) for module in model.base_model.modules()}
    part = model.base_model if all(id(layer) in inside for layer in hooked.values()) else model
    training = model.training
    try:
        model.eval()
        for batch in batches:
            sums.start(batch["attention_mask"].to(model.device))
            part(batch["input_ids"].to(model.device), attention_mask=sums.mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    if not sums.tokens:
        raise ValueError("Gram matrices need at least one row, and there was none")
    found: dict[str, DataStatistic | None] = dict.fromkeys(names)
    for name, layer in hooked.items():
        weight: Any = layer.weight
        width = weight.shape[inputs[name]]
        total = sums.totals.get(name)
        if total is None:  # no token reached this layer
            total = torch.zeros(width, width, device=weight.device)
        found[name] = DataStatistic(total.div_(sums.tokens), inputs=inputs[name] or 0)
    return found


class _Sums:
    """The running sums of one pass over data."""

    def __init__(self) -> None:
        self.tokens = 0
        self.totals: dict[str, Tensor] = {}

    def start(self, mask: Tensor) -> None:
        self.mask, self.tokens = mask, self.tokens + int(mask.sum())
        self._padded = not bool(mask.all())
        self._last: tuple[Tensor, Tensor] | None = None

    def take(self, name: str, layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        inputs = arguments[0]
        if self._last is None or self._last[0] is not inputs:  # projections of one attention layer share their inputs
            if self._padded and inputs.shape[:-1] != self.mask.shape:
                raise ValueError(
                    f"{name} gets inputs of shape {tuple(inputs.shape)}, which are not laid out by row and token "
                    f"{tuple(self.mask.shape)}, so its padding cannot be left out; give data.eval_batch_size: 1"
                )
            rows = inputs[self.mask.bool()] if self._padded else inputs.reshape(-1, inputs.shape[-1])
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            self._last = (inputs, rows.T @ rows)
        product = self._last[1]
        if name in self.totals:
            self.totals[name] += product
        else:
            self.totals[name] = product.clone()


def _inputs(name: str, layer: nn.Module) -> int | None:
    """Return along which dimension of a weight its layer's inputs are; None if it is not a linear layer's matrix."""
    if not name.endswith(".weight"):
        return None
    return 1 if isinstance(layer, nn.Linear) else 0 if is_transposed(layer) else None
