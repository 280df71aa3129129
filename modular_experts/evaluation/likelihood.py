"""Compute the loss of a row's target, whether it is the likeliest answer, and the likelihood of its choices."""

import inspect
from collections.abc import Callable
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from modular_experts.data.batch import IGNORED, Batch, answer_inputs, encoder_inputs
from modular_experts.injection.answer_only import attention_of_answers
from modular_experts.injection.sharded import is_sharded
from modular_experts.injection.task_heads import task_heads
from modular_experts.language_model import acts_on_answers, is_classifier, reads_prompts_apart
from modular_experts.routing.gates import reading
from modular_experts.routing.prompts import evaluation_mode

HEAD_BYTES = 2**28
"""Float32 logits of more bytes are made in parts, and again in backward (`docs/benchmarks/answer-logits.md`)."""
PART = 128
"""Labelled tokens of a part."""
Arguments = tuple[Tensor, ...]
"""Positional arguments of a layer, the hidden states first."""
_PLAIN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Whether a head's model gives its logits as they are, without a scale or a cap; only heads that were looked at."""


def answer_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the logits `(m, vocabulary)` that predict the `m` labelled tokens of a batch, and these tokens `(m,)`.

    Args:
        model: A causal language model, called as `model(input_ids=..., attention_mask=..., use_cache=False)`; for a
            packed batch `position_ids` take the place of the mask. An encoder-decoder gets the prompts in its encoder,
            and the rest in its decoder. A classifier gets the prompts, and its vocabulary are the classes of its heads.
            Where experts act on answers alone, the base reads the prompts first (`injection/answer_only.py`).
        batch: A batch as `data/batch.py` describes it; with a `cache`, the model leaves its state there.
    """
    labels, has_label = _predicted(batch)
    chosen = labels[has_label]
    inputs, labelled = _inputs(model, batch)

    def gather(_: nn.Module, arguments: Arguments) -> Arguments | None:
        hidden = arguments[0]
        return (hidden[labelled][None], *arguments[1:]) if hidden.shape[:2] == labelled.shape else None

    logits = _logits(model, batch, inputs, gather)
    if is_classifier(model):
        tasks = [batch["task"][row] for row in has_label.nonzero()[:, 0].tolist()]
        return logits[labelled[:, 0]], task_heads(model).columns(chosen, tasks)
    return (logits[0] if logits.shape[:2] == (1, len(chosen)) else logits[labelled]), chosen


def _head(model: nn.Module) -> nn.Module | None:
    return getattr(model, "get_output_embeddings", lambda: None)()


def _inputs(model: nn.Module, batch: Batch) -> tuple[Batch, Tensor]:
    """Return what a model is called with, and where its logits predict a labelled token `(lines, length)`."""
    if acts_on_answers(model):
        read = answer_inputs(batch)
        named = {"input_ids": read.ids, "position_ids": read.places}
        named["attention_mask"] = torch.cat([read.prompt_mask[:, :-1], read.mask], 1)
        cache = DynamicCache(config=cast(Any, model).config)
        with reading(tasks=batch.get("task")):
            named["cache"] = cast(Any, model).answer_only.read(read.prompts, read.prompt_mask, cache)
        return named, read.labelled
    if not reads_prompts_apart(model):
        names = ("input_ids", "attention_mask", "position_ids", "cache")
        return {name: batch[name] for name in names if name in batch}, _predicted(batch)[1]
    config: Any = model.config
    if is_classifier(model):
        divided = encoder_inputs(batch, 0, config.get_text_config().pad_token_id)
        return {"input_ids": divided.ids, "attention_mask": divided.mask}, divided.labelled
    divided = encoder_inputs(batch, config.decoder_start_token_id)
    named = {"input_ids": divided.ids, "attention_mask": divided.mask, "decoder_input_ids": divided.decoder_ids}
    return named, divided.labelled


def _logits(
    model: nn.Module, batch: Batch, inputs: Batch, before_head: Callable[[nn.Module, Arguments], Arguments | None]
) -> Tensor:
    """Return what the model gives for the inputs of a batch, with a hook in front of its output head."""
    labels = batch["labels"]
    hook = (_head(model) or nn.Identity()).register_forward_pre_hook(before_head)
    # A router chooses by the prompt, what comes before the first labelled token; it counts neither padding nor fillers.
    owner = batch["row"] if "row" in batch else torch.arange(len(labels), device=labels.device)[:, None]
    tokens = owner >= 0 if "row" in batch else inputs["attention_mask"].bool()
    prompt = tokens if reads_prompts_apart(model) else _prompts(batch)
    if fillers := [row for row, task in enumerate(batch.get("task", [])) if task == ""]:
        tokens = tokens & ~torch.isin(owner, torch.tensor(fillers, device=owner.device))
    attention = attention_of_answers(model, inputs["input_ids"])
    with reading(prompt, batch.get("task"), tokens, batch.get("row")), attention:
        try:
            return model(**inputs, use_cache="cache" in inputs).logits
        finally:
            hook.remove()


def _prompts(batch: Batch) -> Tensor:
    labelled = batch["labels"] != IGNORED
    if "row" not in batch:
        return labelled.cumsum(1) == 0
    rows = batch["row"]
    places = batch["position_ids"]
    starts = torch.full((len(batch["task"]),), places.max() + 1, device=places.device, dtype=places.dtype)
    starts = starts.scatter_reduce(0, rows[labelled], places[labelled], "amin")
    return places < starts[rows]


def row_sums(batch: Batch, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each row the sum `(n,)` of the values `(m,)` of its labelled tokens, and their number `(n,)`."""
    _, labelled = _predicted(batch)
    if "row" not in batch:
        labelled = labelled[:, int(labelled.any(0).int().argmax()) :]
        grid = values.new_zeros(labelled.shape)
        grid[labelled] = values
        return grid.sum(1), labelled.sum(1)
    # The rows get the places back that they have without packing: sums in a fixed order, on any device.
    rows = batch["row"][labelled]
    places = batch["position_ids"][labelled]
    grid = values.new_zeros(len(batch["task"]), labelled.shape[1])
    grid[rows, places] = values
    return grid.sum(1), torch.bincount(rows, minlength=len(grid))


def batch_losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return each row's summed loss in nats, in at least float32 `(n,)`, and its number of labelled tokens `(n,)`."""
    labels, labelled = _predicted(batch)
    head = _head(model)
    if type(head) is nn.Linear and _in_parts(model, head, labelled):
        hidden = _answer_states(model, head, batch)
        if hidden is not None:
            parts = zip(hidden.split(PART), labels[labelled].split(PART), strict=True)
            return row_sums(batch, torch.cat([_recomputed_losses(head, *part) for part in parts]))
    return row_sums(batch, _losses(*answer_logits(model, batch)))


def _recomputed_losses(head: nn.Linear, hidden: Tensor, labels: Tensor) -> Tensor:
    """Return losses whose logits are not kept for backward, but made again."""
    return checkpoint(lambda *inputs: _losses(head(inputs[0]), inputs[1]), hidden, labels, use_reentrant=False)


def _in_parts(model: nn.Module, head: nn.Linear, labelled: Tensor) -> bool:
    if head not in _PLAIN and is_sharded(model):
        return True  # A look may take a second pass, which no process can make alone: all look at their first batch.
    return _PLAIN.get(head, True) and 4 * int(labelled.sum()) * head.out_features > HEAD_BYTES


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels, reduction="none")


def _answer_states(model: nn.Module, head: nn.Linear, batch: Batch) -> Tensor | None:
    """Return the hidden states `(m, hidden)` that the head reads at the labelled tokens; None where the model's logits
    are other than the head's.
    """
    inputs, labelled = _inputs(model, batch)
    seen: list[Tensor] = []

    def take(_: nn.Module, arguments: Arguments) -> Arguments:
        seen.append(arguments[0])
        return (arguments[0][:1, :1], *arguments[1:])

    logits = _logits(model, batch, inputs, take)
    _PLAIN[head] = bool(seen) and seen[0].shape[:2] == labelled.shape and torch.equal(logits, head(seen[0][:1, :1]))
    return seen[0][labelled] if _PLAIN[head] else None


def _predicted(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the label that each place predicts, which is the next place's, and whether there is one."""
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    return labels, labels != IGNORED


def check_packing(model: nn.Module) -> None:
    if acts_on_answers(model):
        raise ValueError(
            "data.packing=True: with model.acts_on=answer prompts are read apart from answers, so rows are not packed; "
            "leave data.packing out"
        )
    if not keeps_rows_apart(model):
        raise ValueError(
            f"data.packing=True: {type(model).__name__} does not keep packed rows apart (its logits of a row change "
            "with the rows before it); leave data.packing out"
        )


@torch.no_grad()
def keeps_rows_apart(model: nn.Module, cached: bool = False) -> bool:
    """Return whether three short packed rows get the same logits as each row alone.

    `cached` also asks this of a pass that keeps keys and values (`with_cache`), which the model must be able to take.
    """
    # A model that takes no positions at all reads the rows as one, and an encoder sees all that it reads.
    takes_places = {"position_ids", "kwargs"} & set(inspect.signature(model.forward).parameters)
    if reads_prompts_apart(model) or not takes_places:
        return False
    device = next(model.parameters()).device
    lengths = (3, 1, 2)
    places = torch.cat([torch.arange(length, device=device) for length in lengths])[None]
    rows = torch.arange(3, device=device).repeat_interleave(torch.tensor(lengths, device=device))[None]
    ids = places + 3
    # With the first token as the prompt, a router of prompts sees the same in all of them.
    with evaluation_mode(model), reading(torch.arange(6, device=device)[None] == 0, [""]):
        whole = model(input_ids=ids, use_cache=False).logits[0]
    # The rows begin alike, and no token sees what comes after it: the start of all rows read as one is each row alone.
    apart = torch.cat([whole[:length] for length in lengths])
    # Rounding differs by the layout of a batch, and by far less than by a change of another row.
    allowed = torch.finfo(apart.dtype).eps ** 0.5 * (whole - apart).float().norm()

    def same(**inputs: object) -> bool:
        with evaluation_mode(model), reading(places == 0, ["", "", ""], row=rows):
            return bool((model(**inputs).logits[0] - apart).float().norm() <= allowed)

    packed: Batch = {"input_ids": ids, "position_ids": places}
    kept = same(**packed, use_cache=False)
    return kept and (not cached or same(**with_cache(model, packed), use_cache=True))  # type: ignore[arg-type]


def with_cache(model: PreTrainedModel, packed: Batch) -> Batch:
    places = packed["position_ids"]
    # With a cache, a model of transformers does not look for packed rows in the positions, so it gets their mask.
    mask = create_masks_for_generate(
        config=model.config,
        inputs_embeds=torch.empty((*places.shape, 0), dtype=model.dtype, device=places.device),
        attention_mask=None,
        cache=None,
        position_ids=places,
    )
    return packed | {"attention_mask": mask, "cache": DynamicCache()}


@torch.no_grad()
def choice_log_likelihoods(model: nn.Module, choices: Batch, rows: int = 16) -> Tensor:
    """Return the summed log-likelihood `(m,)` of each of a batch's `choices`, `rows` of them in a forward pass.

    `task` among the choices, a list of m names, is for routers that choose by it.
    """
    scores = []
    for first in range(0, len(choices["labels"]), rows):
        part = {key: choices[key][first : first + rows] for key in ("input_ids", "attention_mask", "labels")}
        length = int(part["attention_mask"].sum(1).max())
        part = {key: tensor[:, :length] for key, tensor in part.items()}
        if "task" in choices:
            part["task"] = choices["task"][first : first + rows]
        scores.append(-batch_losses(model, part)[0])
    return torch.cat(scores)


@torch.no_grad()
def greedy_matches(model: nn.Module, batch: Batch) -> Tensor:
    """Return for each row whether greedy decoding would generate its target and then stop, `(n,)` booleans."""
    logits, labels = answer_logits(model, batch)
    wrong, _ = row_sums(batch, (logits.argmax(-1) != labels).int())
    return wrong == 0
