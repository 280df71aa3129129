"""Read the prompts of a batch as vectors, and make the gates of a forward pass of them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modular_experts.routing.gates import CurrentGates, rows_at_hand
from modular_experts.routing.router import Router
from modular_experts.text import block_of


class PromptGates:
    """Makes the gates of each forward pass of a model, as its forward pre-hook with keyword arguments.

    Before the pass, the prompts are read in a pass of their own over the first transformer blocks. A pass that goes on
    with kept keys and values keeps the gates of its prompts.

    Args:
        router: A router of scope `sample` that has learned its experts.
        current: Where the mixtures find the gates.
    """

    def __init__(self, router: Router, current: CurrentGates) -> None:
        self.router, self.current, self._inside = router, current, False

    def __call__(self, model: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """Make the gates of a pass, before it starts.

        Raises:
            ValueError: The model was called without `input_ids`, or with packed rows.
        """
        if self._inside or kept_tokens(named):
            return
        ids = named["input_ids"] if "input_ids" in named else next(iter(arguments), None)
        if ids is None:
            raise ValueError("a router reads prompts as `input_ids`, and the model was called without them")
        mask = named.get("attention_mask")
        check_rows(named)
        # Without gates, a mixture is the base alone.
        self.current.gates, self._inside = None, True
        try:
            hidden = torch.cat(prompt_vectors(model, ids, mask, self.router.depths, prompts_at_hand(ids.shape[1])), 1)
        finally:
            self._inside = False
        self.current.gates = self.router.to(hidden.device)(hidden)


def kept_tokens(named: Mapping[str, Any]) -> int:
    """Return of how many tokens a pass with these keyword arguments gets the keys and values, 0 for a new prompt."""
    caches = [named[name] for name in ("past_key_values", "cache") if hasattr(named.get(name), "get_seq_length")]
    return max((int(cache.get_seq_length()) for cache in caches), default=0)


def check_rows(named: Mapping[str, Any]) -> None:
    """Raise ValueError if a pass with these keyword arguments packs several rows in one, so that prompts are mixed."""
    places = named.get("position_ids")
    if named.get("attention_mask") is None and places is not None and bool((places[..., 1:] == 0).any()):
        raise ValueError("this expert reads whole prompts, which it cannot in packed rows; leave data.packing out")


def prompts_at_hand(length: int) -> Tensor | None:
    """Return which places of the pass at hand hold prompts, `(rows, length)` bool; None where `reading` tells nothing.

    Places behind those that `reading` tells of hold an answer, which a model without kept keys and values reads again.
    """
    prompt = rows_at_hand().prompt
    return None if prompt is None else F.pad(prompt, (0, length - prompt.shape[1]))


@torch.no_grad()
def prompt_vectors(
    model: nn.Module, ids: Tensor, mask: Tensor | None, depths: Sequence[float], prompt: Tensor | None = None
) -> list[Tensor]:
    """Return each prompt as a vector of length 1 for each depth, `(rows, size)` float32.

    It is the mean over the prompt's tokens, without the first, of the hidden states after a share of the transformer
    blocks. The pass ends at the deepest one, so it costs that share of a forward pass. It runs without dropout, also
    while the model trains.

    Args:
        model: A causal language model.
        ids: Token ids `(rows, length)`, padded on either side.
        mask: 1 on tokens and 0 on padding, `(rows, length)`; None without padding.
        depths: Shares of the blocks, rising, from 0, the embeddings, to 1.
        prompt: Which tokens are the prompts, `(rows, length)` bool; None where all are.
    """
    body: Any = getattr(model, "base_model", model)
    blocks = list(dict.fromkeys(block for name, _ in body.named_parameters() if (block := block_of(name))))
    numbers = [round(depth * len(blocks)) for depth in depths]
    found: dict[int, Tensor] = {}

    def before(number: int, _: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        found[number] = arguments[0] if arguments else named["hidden_states"]
        if number == max(numbers):
            raise _Reached

    def after(number: int, _: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        found[number] = output if isinstance(output, Tensor) else output[0]
        raise _Reached

    tokens = torch.ones_like(ids) if mask is None else mask
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if mask is not None and "position_ids" in inspect.signature(body.forward).parameters:
        # Padding on the left must not move the places.
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    hooks = []
    for number in dict.fromkeys(numbers):
        if number < len(blocks):
            block = body.get_submodule(blocks[number])
            hooks.append(block.register_forward_pre_hook(partial(before, number), with_kwargs=True))
        else:
            hooks.append(body.get_submodule(blocks[-1]).register_forward_hook(partial(after, number)))
    training = [module for module in body.modules() if module.training]
    body.eval()
    with suppress(_Reached):
        try:
            body(**inputs)
        finally:
            for hook in hooks:
                hook.remove()
            for module in training:
                module.training = True
    counted = tokens.bool() if prompt is None else tokens.bool() & prompt
    # The first token attends to itself alone, so its state, which is the largest by far, is nearly the same everywhere.
    counted = (counted & ((counted.cumsum(1) > 1) | (counted.sum(1, keepdim=True) < 2)))[..., None]
    none = torch.zeros((), device=ids.device)
    return [F.normalize(found[number].float().where(counted, none).sum(1), dim=1) for number in numbers]


class _Reached(Exception):
    """Ends a pass at the block whose inputs are wanted."""
