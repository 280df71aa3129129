"""Let a model answer inputs, and use its answers as labels.

An expert that has learned a task can label the task's inputs for others: for a search of a merge, or for statistics.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from lightning.fabric.utilities import move_data_to_device
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modular_experts.data.batch import Collator, Example, Tokens, fitted
from modular_experts.evaluation.generation import answer_text, cut_answers, generate_tokens, warn_of_cut_answers
from modular_experts.evaluation.scores import exact_match

log = logging.getLogger(__name__)


def answered(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    collate: Collator,
    size: int,
    longest: int,
    max_new_tokens: int = 64,
) -> list[Example]:
    """Return the examples with the model's answers in the place of their targets.

    An answer that reaches `max_new_tokens` has no end-of-sequence, so nothing learns to stop there. A row that is too
    long with its answer then loses tokens on the left of its prompt, as one with a target does; the log counts them.

    Args:
        model: The base with the expert applied; its weights do not change.
        tokenizer: The model's tokenizer.
        examples: Prompts, as `TaskMixture.validation_examples(targets=False)` gives them.
        collate: Makes a batch, with texts.
        size: Rows that are generated together.
        longest: The most tokens of a row, such as `TaskMixture.longest`.
        max_new_tokens: The most tokens of an answer.
    """
    written, cut = dict[int, list[int]](), 0
    # A row has a token of its prompt beside the answer.
    most = min(max_new_tokens, longest - 1)
    # Prompts of about one length in a batch need little padding.
    order = sorted(range(len(examples)), key=lambda row: len(examples[row].tokens.ids))
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        batch = move_data_to_device(collate([examples[row] for row in rows]), model.device)
        answers = generate_tokens(model, tokenizer, batch, most)
        cut += sum(cut_answers(model, tokenizer, batch, answers, most))
        written |= dict(zip(rows, answers, strict=True))
    warn_of_cut_answers(model, cut, len(examples), most)
    found = []
    for row, one in enumerate(examples):
        prompt = fitted(one.tokens.ids, len(written[row]), longest)
        answer = one.tokens.ids.new_tensor(written[row])
        found.append(replace(one, tokens=Tokens(torch.cat([prompt, answer]), len(prompt))))
    shortened = sum(
        len(new.tokens.ids) < len(old.tokens.ids) + len(written[row])
        for row, (new, old) in enumerate(zip(found, examples, strict=True))
    )
    if shortened:
        log.warning(
            "%d of %d rows are longer than %d tokens with their answers and lost their start",
            shortened,
            len(found),
            longest,
        )
    return found


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
