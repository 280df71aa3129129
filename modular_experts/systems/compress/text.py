"""Read running text of the rows of tasks, and measure the perplexity of a model on it."""

from __future__ import annotations

from itertools import chain, zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modular_experts.data import TaskMixture
from modular_experts.data.batch import Example
from modular_experts.data.rows import SPLITS
from modular_experts.data.tasks import Tasks


def read_texts(
    tasks: Tasks, tokenizer: PreTrainedTokenizerBase, tokens: dict[str, int], length: int
) -> dict[str, Tensor]:
    """Return token ids `(rows, length)` of each split: inputs and targets one after the other, tasks taking turns.

    Args:
        tasks: The tasks, as for `TaskMixture`.
        tokenizer: The model's tokenizer.
        tokens: By split how many tokens are taken at most; less if there is less text.
        length: Tokens of a row; a text that is shorter makes one shorter row.

    Raises:
        ValueError: A row is bad, or a task has no rows of a split.
    """
    mixture = TaskMixture(tasks, tokenizer)
    mixture.setup()
    loaders: dict[str, Any] = dict(
        zip(SPLITS, (mixture.train_dataloader, mixture.val_dataloader, mixture.test_dataloader), strict=True)
    )
    texts = {}
    for split, most in tokens.items():
        by_task: dict[str, list[Example]] = {}
        rows = loaders[split]().dataset
        for row in (rows[number] for number in range(len(rows))):
            by_task.setdefault(row.task, []).append(row)
        in_turns = [row for row in chain.from_iterable(zip_longest(*by_task.values())) if row is not None]
        stream = torch.cat([row.tokens.ids for row in in_turns]).long()[:most]
        width = min(length, len(stream))
        texts[split] = stream[: len(stream) // width * width].view(-1, width)
    return texts


@torch.no_grad()
def perplexity(model: PreTrainedModel, text: Tensor, rows: int = 4) -> float:
    """Return the exponential of the mean loss of each token but a row's first.

    Args:
        model: A causal language model.
        text: Token ids `(rows, tokens)`.
        rows: Rows of a pass.
    """
    losses = []
    for part in text.to(model.device).split(rows):
        logits = model(part, use_cache=False).logits[:, :-1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses.append(F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none"))
    return torch.cat(losses).double().mean().exp().item()
