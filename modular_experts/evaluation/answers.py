"""Let a model answer inputs, and put its answers where labels would be.

An expert that has learned a task can label the task's inputs for others: for a search of a merge, or for statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from lightning.fabric.utilities import move_data_to_device
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modular_experts.data.batch import Collator, Example, Tokens
from modular_experts.evaluation.generation import answer_text, generate_tokens
from modular_experts.evaluation.scores import exact_match


def answered(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    collate: Collator,
    size: int,
    longest: int,
    max_new_tokens: int = 64,
) -> list[Example]:
    """Return the examples with what the model generates in the place of their targets.

    An answer that reaches `max_new_tokens` has no end-of-sequence, so nothing learns to stop there.

    Args:
        model: The base with the expert applied; its weights do not change.
        tokenizer: The model's tokenizer.
        examples: Prompts, as `TaskMixture.validation_examples(targets=False)` gives them.
        collate: Makes a batch, with texts.
        size: Rows that are generated together.
        longest: The most tokens of a row; a prompt that leaves no room for an answer loses tokens on its left.
        max_new_tokens: The most tokens of an answer.
    """
    longest = min(longest, getattr(model.config, "max_position_embeddings", None) or longest)
    room, written = max(1, longest - max_new_tokens), dict[int, list[int]]()
    prompts = [replace(one, tokens=Tokens(one.tokens.ids[-room:], len(one.tokens.ids[-room:]))) for one in examples]
    # Prompts of about one length in a batch need little padding.
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row].tokens.ids))
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        batch = move_data_to_device(collate([prompts[row] for row in rows]), model.device)
        written |= dict(zip(rows, generate_tokens(model, tokenizer, batch, max_new_tokens), strict=True))
    answers = [one.tokens.ids.new_tensor(written[row]) for row, one in enumerate(prompts)]
    return [
        replace(one, tokens=Tokens(torch.cat([one.tokens.ids, answer]), one.tokens.prompt))
        for one, answer in zip(prompts, answers, strict=True)
    ]


def agreement(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> float | None:
    """Return the share of answers that match the text of their row's target; None if no row has one."""
    matches = [
        exact_match(
            answer_text(tokenizer, example.tokens.ids[example.tokens.prompt :].tolist(), example.end), example.target
        )
        for example in examples
        if example.target is not None
    ]
    return sum(matches) / len(matches) if matches else None
