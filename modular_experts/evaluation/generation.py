"""Generation: what a model writes after the prompts of a batch, greedily.

Decoding is `model.generate`'s, with left padding, under a configuration that is all ours: a checkpoint's own sampling
or repetition settings would make a measurement depend on them. Model and tokenizer are as before afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from modular_experts.data.batch import Batch, prompts

__all__ = ["evaluating", "generate"]


@torch.no_grad()
def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: Batch, max_new_tokens: int = 64
) -> list[str]:
    """Return what the model writes for each row, up to end-of-sequence, without white space at the ends.

    A prompt that leaves no room for `max_new_tokens` in the model's context loses tokens on its left.

    Args:
        model: A causal language model with `generate`.
        tokenizer: Of the model; its end-of-sequence stops a row.
        batch: As `data/batch.py` says; the prompts are read from its labels.
        max_new_tokens: The most tokens to write.
    """
    eos = tokenizer.eos_token_id
    pad = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids, mask = _left_padded(_within_context(prompts(batch), model, max_new_tokens), pad)
    config = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, eos_token_id=eos, pad_token_id=pad
    )
    with evaluating(model, config):
        written = model.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=mask, generation_config=config
        )[:, ids.shape[1] :]
    return [_text(row, tokenizer) for row in written.tolist()]


def _within_context(rows: Sequence[Tensor], model: PreTrainedModel, max_new_tokens: int) -> list[Tensor]:
    context = getattr(model.config, "max_position_embeddings", None)
    if context is None:
        return list(rows)
    return [row[-max(1, context - max_new_tokens) :] for row in rows]


def _left_padded(rows: Sequence[Tensor], pad: int) -> tuple[Tensor, Tensor]:
    length = max(len(row) for row in rows)
    ids = rows[0].new_full((len(rows), length), pad)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, length - len(row) :] = row
        mask[number, length - len(row) :] = 1
    return ids, mask


@contextmanager
def evaluating(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Hold dropout off, and the model's own configuration too: `generate` takes from it whatever is left open.

    The head gets the last places of the prompts in one piece; why, `answer_logits` says.
    """
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


def _text(written: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    end = written.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in written else len(written)
    return str(tokenizer.decode(written[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)).strip()
