"""Measure Gram matrices along a merge: a block's inputs come from merged blocks (RegMean++, Nguyen et al., arXiv
2508.03121).

From the first transformer block to the last, run each expert's own block behind the blocks merged so far, on the
expert's data; this gives the Gram matrices of the block's layers. Then merge the block. A weight outside of the blocks
is a block of its own, in the order of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from transformers import PreTrainedModel

from modular_experts.base.apply import applied
from modular_experts.data.batch import Batch
from modular_experts.deltas import Delta, Sparse
from modular_experts.methods import MergeMethod, RegMeanPlusPlus
from modular_experts.methods.method import Context, DataStatistic
from modular_experts.progress import Progress
from modular_experts.statistics.gram import gram
from modular_experts.text import block_of

Experts = Sequence[Mapping[str, Delta]]


def merged_grams(
    model: PreTrainedModel,
    experts: Experts,
    batches: Sequence[Sequence[Batch]],
    names: Sequence[str],
    method: MergeMethod | None = None,
    progress: Progress = iter,
) -> list[dict[str, DataStatistic | None]]:
    """Return the Gram matrices of each weight, for each expert.

    Every block costs a pass of the model over the data of each expert. All matrices and a copy of the moved weights are
    in memory. Afterwards every weight of the model is as it was, bit for bit.

    Args:
        model: The base of the experts.
        experts: Name and delta of each weight.
        batches: The data of each expert.
        names: The weights that are merged.
        method: How a block is merged; `RegMeanPlusPlus()` if not given.
    """
    method = method or RegMeanPlusPlus()
    found: list[dict[str, DataStatistic | None]] = [{} for _ in experts]
    wanted, blocks = set(names), dict[str, list[str]]()
    for name, _ in model.named_parameters():
        if name in wanted:
            blocks.setdefault(block_of(name) or name, []).append(name)
    with ExitStack() as applied_so_far:
        for block in progress(list(blocks.values())):
            for expert, data, grams in zip(experts, batches, found, strict=True):
                with applied(model, {name: expert[name] for name in block if name in expert}):
                    grams |= gram(model, data, block)
            merged: dict[str, Delta] = {}
            for name in block:
                still = Sparse.zero(model.get_parameter(name).shape)
                deltas = [expert.get(name, still).to(model.device) for expert in experts]
                merged[name] = method.merge(deltas, Context(name, [grams[name] for grams in found]))
            applied_so_far.enter_context(applied(model, merged))
    return found
