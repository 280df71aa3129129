"""Measure Gram matrices: `X^T X` over the inputs X `(tokens, in)` of a linear layer, as a mean over all tokens."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import torch
import torch.nn.functional as F
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from modular_experts.base.apply import applied
from modular_experts.base.structure import Structure, is_transposed
from modular_experts.data.batch import Batch, encoder_inputs
from modular_experts.deltas import Delta, Sparse
from modular_experts.language_model import is_classifier, reads_prompts_apart
from modular_experts.methods import RegMeanPlusPlus
from modular_experts.methods.method import Context, DataStatistic
from modular_experts.progress import Progress
from modular_experts.routing.gates import reading
from modular_experts.routing.prompts import evaluation_mode
from modular_experts.text import block_of


@torch.no_grad()
def gram(model: PreTrainedModel, batches: Iterable[Batch], names: Sequence[str]) -> dict[str, DataStatistic | None]:
    """Return the Gram matrix `(in, in)` of the inputs of each weight's layer, in at least float32; None for a weight
    that is not the matrix of a linear layer.
    """
    layers = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
    inputs = {name: _inputs(name, layer) for name, layer in layers.items()}
    hooked = {name: layer for name, layer in layers.items() if inputs[name] is not None}
    sums = _Sums()
    handles = [layer.register_forward_pre_hook(partial(sums.take, name)) for name, layer in hooked.items()]
    # Without the head, unless it is measured, because logits take most memory.
    inside = {id(module) for module in model.base_model.modules()}
    part = model.base_model if all(id(layer) in inside for layer in hooked.values()) else model
    try:
        with evaluation_mode(model):
            for batch in batches:
                batch = move_data_to_device(batch, model.device)
                if not reads_prompts_apart(model):
                    sums.start(batch["attention_mask"])
                    part(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
                    continue
                if is_classifier(model):
                    read = encoder_inputs(batch, 0, model.config.get_text_config().pad_token_id)
                    sums.start(read.mask)
                    with reading(tasks=batch["task"]):
                        part(read.ids, attention_mask=read.mask)
                    continue
                divided = encoder_inputs(batch, model.config.decoder_start_token_id)
                # A column more, where both stacks read as many tokens, lets shapes tell them apart.
                more = int(divided.ids.shape[1] == divided.decoder_ids.shape[1])
                ids, mask = F.pad(divided.ids, (0, more)), F.pad(divided.mask, (0, more))
                sums.start(mask, divided.decoder_mask)
                part(ids, attention_mask=mask, decoder_input_ids=divided.decoder_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if not sums.tokens[0]:
        raise ValueError("Gram matrices need at least one row, and there was none")
    statistics: dict[str, DataStatistic | None] = dict.fromkeys(names)
    for name, layer in hooked.items():
        weight = layer.get_parameter("weight")
        dimension = inputs[name] or 0
        width = weight.shape[dimension]
        total = sums.totals.get(name)
        if total is None:  # no token reached this layer
            total = torch.zeros(width, width, device=weight.device)
        statistics[name] = DataStatistic(total.div_(sums.tokens[sums.reads.get(name, 0)]), inputs=dimension)
    return statistics


def merged_grams(
    model: PreTrainedModel,
    experts: Sequence[Mapping[str, Delta]],
    batches: Sequence[Sequence[Batch]],
    names: Sequence[str],
    progress: Progress = iter,
) -> list[dict[str, DataStatistic | None]]:
    """Return the Gram matrices of each weight, for each expert, along a merge by `RegMeanPlusPlus`.

    A block's inputs come from merged blocks (Nguyen et al., arXiv 2508.03121): each expert's own block runs behind the
    blocks merged so far, on the expert's data; then the block is merged. Every block costs a pass of the model over the
    data of each expert. Afterwards every weight of the model is as it was, bit for bit.
    """
    method = RegMeanPlusPlus()
    by_expert: list[dict[str, DataStatistic | None]] = [{} for _ in experts]
    wanted = set(names)
    blocks: dict[str, list[str]] = {}
    shapes = Structure(model).shapes
    for name in shapes:
        if name in wanted:
            blocks.setdefault(block_of(name) or name, []).append(name)
    with ExitStack() as applied_so_far:
        for block in progress(list(blocks.values())):
            for expert, data, grams in zip(experts, batches, by_expert, strict=True):
                with applied(model, {name: expert[name] for name in block if name in expert}):
                    grams |= gram(model, data, block)
            merged: dict[str, Delta] = {}
            for name in block:
                still = Sparse.zero(shapes[name])
                deltas = [expert.get(name, still).to(model.device) for expert in experts]
                merged[name] = method.merge(deltas, Context(name, [grams[name] for grams in by_expert]))
            applied_so_far.enter_context(applied(model, merged))
    return by_expert


class _Sums:
    """The running sums of one pass over data."""

    def __init__(self) -> None:
        # How many tokens each of the masks had, at last the rows, and the number of those that each layer reads.
        self.tokens = [0, 0, 0]
        self.reads: dict[str, int] = {}
        self.totals: dict[str, Tensor] = {}

    def start(self, *masks: Tensor) -> None:
        """Begin a pass, whose layers read tokens by one of the masks, of different shapes `(rows, length)`."""
        self._masks = masks
        for number, mask in enumerate(masks):
            self.tokens[number] += int(mask.sum())
        self.tokens[2] += len(masks[0])
        self._last: tuple[Tensor, Tensor] | None = None

    def take(self, name: str, layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs = arguments[0]
        if inputs.shape[:-1] == self._masks[0].shape[:1]:
            # The layers before a classifier's last one read a vector for each row.
            self.reads[name] = 2
            rows = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
            self._add(name, rows.T @ rows)
            return
        fitting = [number for number, mask in enumerate(self._masks) if mask.shape == inputs.shape[:-1]]
        if not fitting and not all(bool(mask.all()) for mask in self._masks):
            raise ValueError(
                f"{name} gets inputs of shape {tuple(inputs.shape)}, which are not laid out by row and token "
                f"{tuple(self._masks[0].shape)}, so its padding cannot be left out; give data.eval_batch_size: 1"
            )
        self.reads[name] = fitting[0] if fitting else 0
        if self._last is None or self._last[0] is not inputs:  # projections of one attention layer share their inputs
            mask = self._masks[self.reads[name]].bool()
            rows = inputs.reshape(-1, inputs.shape[-1]) if bool(mask.all()) else inputs[mask]
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            self._last = (inputs, rows.T @ rows)
        self._add(name, self._last[1])

    def _add(self, name: str, product: Tensor) -> None:
        if name in self.totals:
            self.totals[name] += product
        else:
            self.totals[name] = product.clone()


def _inputs(name: str, layer: nn.Module) -> int | None:
    """Return along which dimension of a weight its layer's inputs are; None if it is not a linear layer's matrix."""
    if not name.endswith(".weight"):
        return None
    return 1 if isinstance(layer, nn.Linear) else 0 if is_transposed(layer) else None
