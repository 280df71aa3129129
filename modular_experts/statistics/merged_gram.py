"""Measure the Gram matrices of layers' inputs (`evaluation/gram.py`) along a merge.

A block's inputs come from merged blocks (RegMean++, Nguyen et al., arXiv 2508.03121): each expert's own block runs
behind the blocks merged so far, on the expert's data; then the block is merged.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from transformers import PreTrainedModel

from modular_experts.base.apply import applied
from modular_experts.data.batch import Batch
from modular_experts.deltas import Delta, Sparse
from modular_experts.evaluation.gram import gram
from modular_experts.methods import RegMeanPlusPlus
from modular_experts.methods.method import Context, DataStatistic
from modular_experts.progress import Progress
from modular_experts.text import block_of


def merged_grams(
    model: PreTrainedModel,
    experts: Sequence[Mapping[str, Delta]],
    batches: Sequence[Sequence[Batch]],
    names: Sequence[str],
    progress: Progress = iter,
) -> list[dict[str, DataStatistic | None]]:
    """Return the Gram matrices of each weight, for each expert, where `RegMeanPlusPlus` merges each block.

    Every block costs a pass of the model over the data of each expert. Afterwards every weight of the model is as it
    was, bit for bit.
    """
    method = RegMeanPlusPlus()
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
