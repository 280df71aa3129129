"""Generate greedily after the prompts of a batch.

`model.generate` decodes, with left padding and a configuration of this file alone, so that a checkpoint's sampling or
repetition settings do not change a measurement. Model and tokenizer are left as they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from modular_experts.data.batch import Batch, prompts


@torch.no_grad()
def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: Batch, max_new_tokens: int = 64
) -> list[str]:
    """Return the text that the model generates for each row, up to end-of-sequence, without white space at its ends.

    The labels of the batch show where its prompts end. A prompt that leaves no room for `max_new_tokens` in the model's
    context loses tokens on its left.
    """
    eos = tokenizer.eos_token_id
    pad = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    rows, context = list(prompts(batch)), getattr(model.config, "max_position_embeddings", None)
    if context is not None:
        rows = [row[-max(1, context - max_new_tokens) :] for row in rows]
    length = max(len(row) for row in rows)
    ids = rows[0].new_full((len(rows), length), pad)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, length - len(row) :] = row
        mask[number, length - len(row) :] = 1
    config = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, eos_token_id=eos, pad_token_id=pad
    )
    with evaluating(model, config):
        written = model.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=mask, generation_config=config
        )[:, length:]
    texts = []
    for row in written.tolist():
        answer = row[: row.index(eos)] if eos in row else row
        text = tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        texts.append(str(text).strip())
    return texts


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
