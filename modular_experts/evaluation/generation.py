"""Generate greedily after the prompts of a batch.

`model.generate` decodes, with left padding and a configuration of this file alone, so that a checkpoint's sampling or
repetition settings do not change a measurement. Model and tokenizer are left as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from modular_experts.data.batch import Batch, prompts
from modular_experts.injection import context_length
from modular_experts.routing.gates import reading


@torch.no_grad()
def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: Batch, max_new_tokens: int = 64
) -> list[str]:
    """Return the text that the model generates for each row, up to end-of-sequence, without white space at its ends.

    The labels of the batch show where its prompts end, and `end` what ends an answer beside end-of-sequence. A prompt
    that leaves no room for `max_new_tokens` in the model's context loses tokens on its left.
    """
    return [
        answer_text(tokenizer, row, end)
        for row, end in zip(
            generate_tokens(model, tokenizer, batch, max_new_tokens), _ends(tokenizer, batch), strict=True
        )
    ]


def answer_text(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], end: int | None = None) -> str:
    """Return the text of generated tokens without the one that ends them, and without white space at its ends."""
    ended = bool(tokens) and tokens[-1] in (tokenizer.eos_token_id, end)
    kept = list(tokens[: len(tokens) - ended])
    return str(tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)).strip()


@torch.no_grad()
def generate_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: Batch, max_new_tokens: int = 64
) -> list[list[int]]:
    """Return the tokens that the model generates for each row, the one that ends the answer included.

    An answer of `max_new_tokens` may have no such token. The arguments are those of `generate`.
    """
    eos = tokenizer.eos_token_id
    pad = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    rows, context = list(prompts(batch)), context_length(model)
    if context is not None:
        rows = [row[-max(1, context - max_new_tokens) :] for row in rows]
    ends, answers = _ends(tokenizer, batch), [list[int]() for _ in rows]
    tasks = batch.get("task")
    # Rows that end alike are generated together, so that no row stops at the end of another.
    for end in dict.fromkeys(ends):
        chosen = [number for number in range(len(rows)) if ends[number] == end]
        length = max(len(rows[number]) for number in chosen)
        ids = rows[0].new_full((len(chosen), length), pad)
        mask = torch.zeros_like(ids)
        for place, number in enumerate(chosen):
            ids[place, length - len(rows[number]) :] = rows[number]
            mask[place, length - len(rows[number]) :] = 1
        stops = list(dict.fromkeys([eos, end]))
        config = GenerationConfig(
            do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, eos_token_id=stops, pad_token_id=pad
        )
        with evaluating(model, config), reading(mask.bool(), tasks and [tasks[number] for number in chosen]):
            written = model.generate(  # type: ignore[operator]
                input_ids=ids, attention_mask=mask, generation_config=config
            )[:, length:]
        for number, row in zip(chosen, written.tolist(), strict=True):
            stop = next((place for place, token in enumerate(row) if token in stops), len(row))
            answers[number] = row[: stop + 1]
    return answers


def _ends(tokenizer: PreTrainedTokenizerBase, batch: Batch) -> list[int]:
    """Return the token that ends the answer of each row beside end-of-sequence."""
    return batch.get("end", [tokenizer.eos_token_id] * len(batch["input_ids"]))


@contextmanager
def evaluating(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Turn off dropout, and replace the model's own configuration, from which `generate` fills in what is not set."""
    # The head gets hidden states without gaps in memory: of a slice, torch multiplies row by row with a head that is
    # not trained, which takes several times as long in bfloat16 on a CPU (`benchmarks/answer_logits.py`).
    head = model.get_output_embeddings() or nn.Identity()
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    training, own = model.training, model.generation_config
    model.generation_config = config
    model.eval()
    try:
        yield
    finally:
        hook.remove()
        model.train(training)
        model.generation_config = own
