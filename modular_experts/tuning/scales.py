"""Fit the scales of values in few bits to the outputs of the layers, by least squares.

A sign and the mean size of its row are near to a delta entry by entry. A layer's outputs weigh the entries by its
inputs, and these are neither equally long nor independent, so another scale of the same row is nearer there.
"""

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modular_experts.base.apply import applied
from modular_experts.base.structure import is_transposed
from modular_experts.data.batch import Batch
from modular_experts.deltas import Delta, LowRank
from modular_experts.deltas.algebra import dot_by_row
from modular_experts.evaluation.gram import gram
from modular_experts.methods.method import DataStatistic
from modular_experts.progress import in_passes

log = logging.getLogger(__name__)

FURTHEST = 4.0
"""The largest factor of a scale, and one over the smallest: rows that the data hardly reach stay near their scale."""


def row_factors(delta: Delta, coded: Delta, inputs: DataStatistic) -> Tensor:
    """Return the factors `(rows,)` for the scales of a coded delta that bring it nearest to the delta on outputs.

    A row c of the coded delta that stands for a row d gets `f = (c^T G d) / (c^T G c)`, where `G = X^T X` is the Gram
    matrix of the layer's inputs X. This f makes `|X d - f X c|^2` least; it is kept in [1 / `FURTHEST`, `FURTHEST`]. A
    row whose outputs are zero gets 1. Where a row of the weight belongs to an input, as in GPT-2's `Conv1D`, all rows
    share one factor `(1,)`, which makes the error of the whole layer least.
    """
    # A dense product takes a quarter of the time of a sparse one at 5 % of the entries.
    matrix, weight = inputs.values.to(coded.device, coded.dtype), coded.dense()
    by_output = inputs.inputs == 1
    outputs = weight @ matrix if by_output else matrix @ weight
    products, squares = dot_by_row(outputs, delta), dot_by_row(outputs, coded)
    if not by_output:
        products, squares = products.sum(0, keepdim=True), squares.sum(0, keepdim=True)
    return torch.where(squares > 0, products / squares, 1.0).clamp(1 / FURTHEST, FURTHEST)


def fitted_factors(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    deltas: Mapping[str, Delta],
    codings: Sequence[Callable[[str], Delta]],
) -> list[dict[str, Tensor]]:
    """Return for each coding the `row_factors` of each weight, on the inputs that the layers of the expert get.

    A coding returns the coded delta of a weight by its name. The weights are the matrices of linear layers whose delta
    is not low-rank. The Gram matrices take at most as much memory as the model, which is as before afterwards, bit for
    bit, and a pass over the data measures as many as fit.
    """
    found: list[dict[str, Tensor]] = [{} for _ in codings]
    wanted = {n: d for n, d in deltas.items() if len(d.shape) == 2 and not isinstance(d, LowRank) and not d.is_empty}
    turned = {name: is_transposed(model.get_submodule(name.rpartition(".")[0])) for name in wanted}
    sizes = {name: 4 * delta.shape[0 if turned[name] else 1] ** 2 for name, delta in wanted.items()}
    with applied(model, deltas, check=False):
        for names in in_passes(sizes, sum(weight.nbytes for weight in model.parameters())) if codings else ():
            try:
                grams = gram(model, batches, names)
            except ValueError as error:  # inputs that padding cannot be left out of
                log.info("scales stay as they are: %s", error)
                continue
            for name, inputs in grams.items():
                if inputs is None:
                    continue
                for factors, coding in zip(found, codings, strict=True):
                    factors[name] = row_factors(deltas[name], coding(name), inputs)
    return found
