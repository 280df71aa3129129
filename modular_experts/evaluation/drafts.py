"""Score targets and decode answers without padding, with each target as the draft of its answer.

The pass over packed rows that gives the losses also tells which tokens greedy decoding would write: the target's tokens
up to the first that is not the likeliest, and the likeliest there (speculative decoding verifies a draft in this way:
Leviathan et al., 2023). A row whose target is wrong goes on from there, with the keys and values of the pass.
"""

import inspect
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from modular_experts.data.batch import IGNORED, Batch, prompts_of, repacked
from modular_experts.evaluation.generation import answer_rooms
from modular_experts.evaluation.likelihood import (
    answer_logits,
    choice_log_likelihoods,
    keeps_rows_apart,
    row_sums,
    with_cache,
)
from modular_experts.injection import moves_tokens_alone
from modular_experts.routing.gates import reading


def packs_evaluation(model: nn.Module) -> bool:
    """Return whether packed rows have the logits that each has alone, with keys and values kept and without."""
    known = isinstance(model, PreTrainedModel) and "cache" in inspect.signature(model.forward).parameters
    return moves_tokens_alone(model) and known and keeps_rows_apart(model, cached=True)


@torch.no_grad()
def losses_and_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: Batch, max_new_tokens: int = 64
) -> tuple[tuple[Tensor, Tensor], list[list[int]]]:
    """Return what `batch_losses` and `generate_tokens` give for a padded batch with texts.

    Its rows fit into the context. `packs_evaluation` must be true of the model, which is in evaluation mode.
    """
    packed = with_cache(model, repacked(batch))
    logits, labels = answer_logits(model, packed)
    likeliest = logits.argmax(-1).tolist()
    wanted = labels.tolist()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = row_sums(packed, F.cross_entropy(logits, labels, reduction="none"))
    answers: list[list[int]] = [[] for _ in batch["task"]]
    right = [True for _ in answers]
    labelled = F.pad(packed["labels"][:, 1:], (0, 1), value=IGNORED) != IGNORED
    for row, token, target in zip(packed["row"][labelled].tolist(), likeliest, wanted, strict=True):
        if right[row]:
            answers[row].append(token)
            right[row] = token == target
    stops = [{tokenizer.eos_token_id, end} for end in batch["end"]]
    read, rooms = answer_rooms(model, prompts_of(batch), max_new_tokens)
    for row, answer in enumerate(answers):
        ends = [place + 1 for place, token in enumerate(answer) if token in stops[row]]
        del answer[min([*ends, rooms[row]]) :]
    going = [row for row, answer in enumerate(answers) if _goes_on(answer, stops[row], rooms[row])]
    # The last token of each answer is not read yet.
    lengths = [len(prompt) + len(answer) - 1 for prompt, answer in zip(read, answers, strict=True)]
    if going:
        state = _state(packed["cache"], packed["row"], going, [lengths[row] for row in going])
        del packed, logits
        _decode(model, state, lengths, answers, going, stops, rooms)
    return losses, answers


@torch.no_grad()
def choices_behind_prompts(model: PreTrainedModel, choices: Batch, lines: int = 32) -> Tensor:
    """Return what `choice_log_likelihoods` gives, reading the prompt of a row once for all of its choices.

    `packs_evaluation` must be true of the model. `lines` choices are read in a forward pass, each with a copy of the
    keys and values of its prompt.
    """
    owner = choices["row"].tolist()
    places = {row: place for place, row in enumerate(dict.fromkeys(owner))}
    first = torch.tensor([owner.index(row) for row in places], device=choices["row"].device)
    prompts = prompts_of(choices)
    if min(map(len, prompts)) == 1:
        # Such a prompt leaves no keys and values, without which a pass begins anew, also for routers.
        return choice_log_likelihoods(model, choices)
    batch = {key: choices[key][first] for key in ("input_ids", "attention_mask")}
    # Without its answers, a row is all prompt.
    batch["attention_mask"] = batch["attention_mask"] * (choices["labels"][first] == IGNORED)
    batch["labels"] = torch.full_like(batch["input_ids"], IGNORED)
    packed = with_cache(model, repacked(batch | {"task": [choices["task"][number] for number in first.tolist()]}))
    answer_logits(model, packed)
    scores = []
    for start in range(0, len(owner), lines):
        numbers = range(start, min(start + lines, len(owner)))
        rows = [places[owner[number]] for number in numbers]
        # The last token of a prompt is read again, as it predicts the first token of the answer.
        lengths = [len(prompts[number]) - 1 for number in numbers]
        state = _state(packed["cache"], packed["row"], rows, lengths)
        answers = [choices["labels"][number][choices["labels"][number] != IGNORED] for number in numbers]
        scores.append(
            _log_likelihoods(model, state, [prompts[number][-1:] for number in numbers], answers, rows, lengths)
        )
    return torch.cat(scores)


def _log_likelihoods(
    model: PreTrainedModel,
    cache: DynamicCache,
    last: Sequence[Tensor],
    answers: Sequence[Tensor],
    rows: Sequence[int],
    lengths: Sequence[int],
) -> Tensor:
    """Return the summed log-likelihood of each answer behind its kept prompt and the `last` token of that."""
    device = model.device
    read = [torch.cat([token, answer[:-1]]) for token, answer in zip(last, answers, strict=True)]
    ids = pad_sequence(read, batch_first=True)
    wanted = pad_sequence(list(answers), batch_first=True, padding_value=IGNORED)
    before = torch.tensor(lengths, device=device)[:, None]
    kept = torch.arange(int(before.max()), device=device) >= before.max() - before
    places = torch.arange(ids.shape[1], device=device)
    mask = torch.cat([kept, wanted != IGNORED], 1).long()
    row = torch.tensor(rows, device=device)[:, None].expand_as(ids)
    with reading(row=row):
        output = model(input_ids=ids, attention_mask=mask, position_ids=before + places, cache=cache, use_cache=True)
    logits = output.logits.to(torch.promote_types(output.logits.dtype, torch.float32))
    losses = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none", ignore_index=IGNORED)
    return -losses.view_as(wanted).sum(1)


def _goes_on(answer: list[int], stops: set[int], most: int) -> bool:
    return 0 < len(answer) < most and answer[-1] not in stops


def _state(cache: DynamicCache, row: Tensor, rows: Sequence[int], lengths: Sequence[int]) -> DynamicCache:
    """Return keys and values of the first `lengths` tokens of some packed rows, padded on the left to the longest."""
    longest = max(lengths)
    flat = row.flatten().tolist()
    taken = torch.zeros(len(rows), longest, dtype=torch.int64)
    for line, (number, length) in enumerate(zip(rows, lengths, strict=True)):
        first = flat.index(number)
        taken[line, longest - length :] = torch.arange(first, first + length)
    pack, place = (part.to(row.device) for part in (taken // row.shape[1], taken % row.shape[1]))
    state = DynamicCache()
    for number, layer in enumerate(cache.layers):
        assert isinstance(layer, DynamicLayer)
        assert layer.keys is not None
        assert layer.values is not None
        # `(packs, heads, length, size)` to `(rows, heads, longest, size)`.
        keys, values = (kept[pack, :, place].transpose(1, 2) for kept in (layer.keys, layer.values))
        state.update(keys, values, number)
    return state


def _decode(
    model: PreTrainedModel,
    cache: DynamicCache,
    lengths: Sequence[int],
    answers: list[list[int]],
    rows: list[int],
    stops: Sequence[set[int]],
    most: Sequence[int],
) -> None:
    device = model.device
    places = torch.tensor([[lengths[row]] for row in rows], device=device)
    mask = (torch.arange(int(places.max()), device=device) >= places.max() - places).long()
    while rows:
        mask = F.pad(mask, (0, 1), value=1)
        last = torch.tensor([answers[row][-1:] for row in rows], device=device)
        # Gates of prompts stay with their rows.
        with reading(row=torch.tensor(rows, device=device)[:, None]):
            output = model(input_ids=last, attention_mask=mask, position_ids=places, cache=cache, use_cache=True)
        places = places + 1
        for row, token in zip(rows, output.logits[:, -1].argmax(-1).tolist(), strict=True):
            answers[row].append(token)
        kept = [place for place, row in enumerate(rows) if _goes_on(answers[row], stops[row], most[row])]
        if len(kept) < len(rows):
            chosen = torch.tensor(kept, dtype=torch.int64, device=device)
            cache.batch_select_indices(chosen)
            mask = mask[chosen]
            places = places[chosen]
            rows = [rows[place] for place in kept]
