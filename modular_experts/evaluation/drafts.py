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
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from modular_experts.data.batch import IGNORED, Batch, prompts_of, repacked
from modular_experts.evaluation.generation import answer_rooms
from modular_experts.evaluation.likelihood import answer_logits, keeps_rows_apart, row_sums, with_cache
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
