"""Generate greedily after the prompts of a batch, whatever the generation settings of a checkpoint are."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from modular_experts.data.batch import Batch, Collator, Example, Tokens, fitted, prompts_of
from modular_experts.data.chat import classifies
from modular_experts.injection import context_length
from modular_experts.injection.task_heads import class_name, task_heads
from modular_experts.language_model import is_classifier, prompt_reader
from modular_experts.routing.gates import reading
from modular_experts.routing.prompts import evaluation_mode

log = logging.getLogger(__name__)


def answer_rooms(model: nn.Module, prompts: Sequence[Tensor], max_new_tokens: int) -> tuple[list[Tensor], list[int]]:
    """Return prompts as the model reads them, and how many tokens the answer to each of them may have.

    Where both are longer than the model's context, the answer gives way, down to one token; a prompt that fills the
    context alone then loses tokens on its left.
    """
    context = context_length(model)
    if context is None:
        return list(prompts), [max_new_tokens for _ in prompts]
    kept = [fitted(prompt, 1, context) for prompt in prompts]
    return kept, [min(max_new_tokens, context - len(prompt)) for prompt in kept]


def answer_room(model: nn.Module, prompt: int, most: int) -> int:
    """Return how many tokens, at most `most`, the answer to a prompt of so many tokens may have."""
    context = context_length(model)
    if context is not None and prompt >= context:
        raise ValueError(
            f"the prompt has {prompt} tokens, and the base's context has room for {context}; shorten the prompt"
        )
    return most if context is None else min(most, context - prompt)


def cut_answers(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, batch: Batch, answers: Sequence[Sequence[int]], most: int
) -> list[bool]:
    """Return of each answer whether the model's context ended it, before `most` tokens and without an end."""
    if is_classifier(model):
        return [False for _ in answers]
    _, rooms = answer_rooms(model, prompts_of(batch), most)
    ends = _ends(tokenizer, batch)
    return [
        len(answer) == room < most and answer[-1] not in (tokenizer.eos_token_id, end)
        for answer, room, end in zip(answers, rooms, ends, strict=True)
    ]


def warn_of_cut_answers(model: nn.Module, cut: int, rows: int, most: int, task: str = "") -> None:
    """Log how many of the answers to `rows` the model's context ended, if any."""
    sentence = (
        "%s%d of %d answers ended where the model's context of %s tokens does, before max_new_tokens=%d; shorten their "
        "prompts, which a lower max_length does as well"
    )
    if cut:
        log.warning(sentence, task and f"{task}: ", cut, rows, context_length(model), most)


@torch.no_grad()
def generate_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: Batch, max_new_tokens: int = 64
) -> list[str]:
    """Return the text that the model generates for each row, without white space at its ends.

    The labels of the batch show where its prompts end. An answer ends at end-of-sequence, at the row's `end`, and where
    the model's context does.
    """
    return answer_texts(tokenizer, batch, generate_tokens(model, tokenizer, batch, max_new_tokens))


def answer_texts(tokenizer: PreTrainedTokenizerBase, batch: Batch, answers: Sequence[Sequence[int]]) -> list[str]:
    return [answer_text(tokenizer, row, end) for row, end in zip(answers, _ends(tokenizer, batch), strict=True)]


def answer_text(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], end: int | None = None) -> str:
    """Return the text of generated tokens without the one that ends them, and without white space at its ends.

    A classifier's answer is the name of the class.
    """
    if classifies(tokenizer):
        return class_name(tokens[0])
    ended = bool(tokens) and tokens[-1] in (tokenizer.eos_token_id, end)
    kept = list(tokens[: len(tokens) - ended])
    return str(tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)).strip()


@torch.no_grad()
def generate_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: Batch, max_new_tokens: int = 64
) -> list[list[int]]:
    """Return the tokens that `generate_texts` makes a text of, with the one that ends the answer, if one does."""
    if is_classifier(model):
        return [[number] for number in classified(model, prompts_of(batch), batch.get("task"))[0].tolist()]
    eos = tokenizer.eos_token_id
    pad = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    rows, rooms = answer_rooms(model, prompts_of(batch), max_new_tokens)
    ends = _ends(tokenizer, batch)
    answers: list[list[int]] = [[] for _ in rows]
    tasks = batch.get("task")
    # Rows that end alike are generated together, so that no row stops at the end of another or leaves its context.
    for end, room in dict.fromkeys(zip(ends, rooms, strict=True)):
        chosen = [number for number in range(len(rows)) if (ends[number], rooms[number]) == (end, room)]
        together = [rows[number] for number in chosen]
        side = "left" if prompt_reader(model) is model else "right"
        ids = pad_sequence(together, batch_first=True, padding_value=pad, padding_side=side)
        mask = pad_sequence([torch.ones_like(row) for row in together], batch_first=True, padding_side=side)
        stops = list(dict.fromkeys([eos, end]))
        with reading(mask.bool(), tasks and [tasks[number] for number in chosen]):
            config = GenerationConfig(
                do_sample=False, num_beams=1, max_new_tokens=room, eos_token_id=stops, pad_token_id=pad
            )
            written = continued(model, ids, mask, config)
        for number, row in zip(chosen, written.tolist(), strict=True):
            stop = next((place for place, token in enumerate(row) if token in stops), len(row))
            answers[number] = row[: stop + 1]
    return answers


@torch.no_grad()
def classified(
    model: nn.Module, prompts: Sequence[Tensor], tasks: Sequence[str] | None = None
) -> tuple[Tensor, Tensor]:
    """Return the number of each prompt's likeliest class, and its probability, by the heads of the tasks."""
    config: Any = model.config
    context = context_length(model)
    kept = [prompt if context is None else fitted(prompt, 0, context) for prompt in prompts]
    ids = pad_sequence(kept, batch_first=True, padding_value=config.get_text_config().pad_token_id)
    mask = pad_sequence([torch.ones_like(row) for row in kept], batch_first=True)
    with evaluation_mode(model), reading(mask.bool(), tasks):
        likeliest = model(input_ids=ids, attention_mask=mask).logits.float().softmax(-1).max(-1)
    return task_heads(model).numbers(likeliest.indices), likeliest.values


def _ends(tokenizer: PreTrainedTokenizerBase, batch: Batch) -> list[int]:
    return batch.get("end", [tokenizer.eos_token_id for _ in batch["input_ids"]])


def continued(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, config: GenerationConfig, streamer: BaseStreamer | None = None
) -> Tensor:
    """Return the tokens that a model generates behind prompts.

    Prompts are padded on the left, and on the right for an encoder, which is also how an encoder-decoder was trained.
    """
    behind = ids.shape[1]
    if prompt_reader(model) is not model:
        config.decoder_start_token_id = model.config.decoder_start_token_id
        behind = 1
    with evaluating(model, config):
        whole = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, streamer=streamer)  # type: ignore[operator]
        return whole[:, behind:]


@contextmanager
def evaluating(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Turn off dropout, and replace the model's own configuration, from which `generate` fills in what is not set."""
    # The head gets hidden states without gaps in memory: of a slice, torch multiplies row by row with a head that is
    # not trained, which takes several times as long in bfloat16 on a CPU (`benchmarks/answer_logits.py`).
    head = model.get_output_embeddings() or nn.Identity()
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    own = model.generation_config
    model.generation_config = config
    try:
        with evaluation_mode(model):
            yield
    finally:
        hook.remove()
        model.generation_config = own


def answered(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    collate: Collator,
    size: int,
    longest: int,
    max_new_tokens: int = 64,
) -> list[Example]:
    """Return the examples with the model's answers in the place of their targets, for a search or for statistics.

    Examples are prompts, as `TaskMixture.validation_examples(targets=False)` gives them, of which `size` are generated
    together. A row of more than `longest` tokens with its answer loses the left of its prompt; the log counts them.
    """
    written: dict[int, list[int]] = {}
    cut = 0
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
    labelled = []
    shortened = 0
    for row, example in enumerate(examples):
        ids = example.tokens.ids
        prompt = fitted(ids, len(written[row]), longest)
        shortened += len(prompt) < len(ids)
        labelled.append(replace(example, tokens=Tokens(torch.cat([prompt, ids.new_tensor(written[row])]), len(prompt))))
    if shortened:
        sentence = "%d of %d rows are longer than %d tokens with their answers and lost their start"
        log.warning(sentence, shortened, len(labelled), longest)
    return labelled
