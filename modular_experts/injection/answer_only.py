"""Let the experts of a model act on answers alone: from the last token of a prompt on, which predicts the first answer.

The base alone reads what stands before that token, without gradients, and leaves its keys and values there. So a step
of training has no backward pass through prompts, and every expert reads the same prompt alike. Activated LoRA (arXiv
2504.12397) is the LoRA of this form.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from modular_experts.experts.expert import InPlaceExpert, trains_weight
from modular_experts.injection.inject import expert_layers, named_experts, write_experts
from modular_experts.injection.layers import ExpertConv1D, ExpertQuantised
from modular_experts.language_model import acts_on_answers, reads_prompts_apart
from modular_experts.routing.mixture import Mixture
from modular_experts.routing.prompts import PromptGates, evaluation_mode, kept_tokens

NOT_MERGEABLE_BECAUSE = "it acts on answers alone, and in the base's weights it would act on prompts, too"
"""Why no delta is all that such an expert does, as the end of a sentence."""
SHORT = 64
"""Tokens of an answer up to which attention is computed by plain products on a CPU."""


class AnswerOnly:
    """Makes the passes of a model whose experts act on answers alone; it is the model's attribute `answer_only`.

    A pass that goes on with kept keys and values is one of answers. A pass with an empty cache, as `generate` begins,
    is one of prompts, which the base alone reads here. A pass without a cache does not tell where answers begin, so it
    raises.

    Args:
        model: A causal language model with experts that are deltas of its linear layers.
        gates: Chooses the experts of prompts in the base's pass over them; None where no router does.

    Raises:
        ValueError: The model or an expert cannot do so.
    """

    def __init__(self, model: Any, gates: PromptGates | None = None) -> None:
        _check(model)
        self.model = model
        self.gates = None
        self._is_base_alone = False
        self._hook = model.base_model.register_forward_pre_hook(self._before, with_kwargs=True)
        model.answer_only = self
        try:
            self._check_continues()
        except BaseException:
            self.remove()
            raise
        self.gates = gates

    def remove(self) -> None:
        """Let the experts act on all tokens again."""
        self._hook.remove()
        del self.model.answer_only

    @torch.no_grad()
    def read(self, ids: Tensor, mask: Tensor, cache: Any = None) -> Any:
        """Return a cache with the base's keys and values of prompts `(n, length)`, up to each prompt's last token.

        The given cache is empty; without gates, None makes a new one. Prompts are padded on the left, where the mask
        `(n, length)` is 0.
        """
        if self.gates is not None:
            if _can_crop(cache):
                # A layer of sliding attention then keeps what the crop needs.
                cache.activate_past_recording()
                self.gates.choose(self.model, ids, mask, cache=cache)
                cache.crop(-1)
                return cache
            self.gates.choose(self.model, ids, mask)
        ids, mask = ids[:, :-1], mask[:, :-1]
        if not ids.shape[1]:
            return cache
        named = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        with self.base_alone(), evaluation_mode(self.model):
            return self.model.base_model(**named, cache=cache, use_cache=True).cache

    @contextmanager
    def base_alone(self) -> Iterator[None]:
        """Take the experts out of all passes while the context is open."""
        layers = [layer for _, layer in expert_layers(self.model)]
        for layer in layers:
            # To a quantised weight, values are added in each pass.
            if isinstance(layer.expert, InPlaceExpert) and not isinstance(layer, ExpertQuantised):
                layer.expert.restore(layer.matrix, layer.matrix.detach)
            layer.is_idle = True
        self._is_base_alone = True
        try:
            yield
        finally:
            self._is_base_alone = False
            for layer in layers:
                layer.is_idle = False
            write_experts(self.model)

    def _before(
        self, body: nn.Module, arguments: tuple[Tensor, ...], named: Mapping[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        if self._is_base_alone or kept_tokens(named):
            return None
        cache = named.get("cache")
        # GPT-2 gives them to its body by position.
        ids = named.get("input_ids", *arguments[:1])
        if cache is None or ids is None:
            raise ValueError(
                "the experts of this model act on answers alone, and a pass without a cache does not tell where the "
                "answer begins; take model.generate, or evaluation.batch_losses for the loss of answers"
            )
        mask = named.get("attention_mask")
        if mask is None:
            mask = torch.ones_like(ids)
        if ids.shape[1] > 1 or self.gates is not None:
            self.read(ids, mask, cache)
        places = mask.sum(1, keepdim=True) - 1
        return (), {**named, "input_ids": ids[:, -1:], "attention_mask": mask, "position_ids": places}

    @torch.no_grad()
    def _check_continues(self) -> None:
        """Raise if a padded pass behind kept keys and values differs from the pass over the whole row."""
        refusal = (
            f"acts_on=answer: {type(self.model).__name__} reads an answer behind kept keys and values otherwise than "
            "behind its prompt; leave acts_on out"
        )
        body = self.model.base_model
        device = self.model.device
        whole = torch.arange(3, 11, device=device)[None]
        prompts = (6, 3)
        with self.base_alone(), evaluation_mode(self.model):
            rows = [whole[:, : length + 2] for length in prompts]
            apart = torch.cat([body(input_ids=row, use_cache=False)[0][:, -2:] for row in rows])
            answers = torch.cat([row[:, -2:] for row in rows])
            alone = body(input_ids=answers, use_cache=False)[0]
        padded = torch.cat([whole[:, :7], whole[:, [0, 0, 0, 0, 1, 2, 3]]])
        read = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1]], device=device)
        cache = self.read(padded, read)
        places = torch.tensor([[length, length + 1] for length in prompts], device=device)
        mask = torch.cat([read[:, :-1], torch.ones_like(answers)], 1)
        named = {"input_ids": answers, "attention_mask": mask, "position_ids": places, "cache": cache}
        with self.base_alone(), evaluation_mode(self.model):
            try:
                behind = body(**named, use_cache=True)[0]
            except RuntimeError as error:
                # Mamba takes one token at a time behind what it has read.
                raise ValueError(refusal) from error
        # Rounding differs by the layout of a batch, in bfloat16 by up to a tenth of the prompt's part.
        allowed = torch.finfo(apart.dtype).eps ** 0.25 * (alone - apart).float().norm()
        if not (behind - apart).float().norm() <= allowed:
            raise ValueError(refusal)


def attention_of_answers(model: nn.Module, ids: Tensor) -> AbstractContextManager[object]:
    """Return a context for a pass of answers `(n, length)`, in which few queries take less time on a CPU.

    For five queries a row, torch's flash attention took a fifth of a step there.
    """
    is_short = acts_on_answers(model) and ids.device.type == "cpu" and ids.shape[1] <= SHORT
    return sdpa_kernel(SDPBackend.MATH) if is_short else nullcontext()


def _can_crop(cache: Any) -> bool:
    """Return whether the last token can be taken out of a cache again; out of a recurrent state it cannot."""
    return not any(hasattr(layer, "recurrent_states") for layer in cache.layers)


def _check(model: Any) -> None:
    """Raise ValueError if the experts of a model cannot act on answers alone."""
    kind = type(model).__name__
    reason = ""
    if acts_on_answers(model):
        reason = "the experts of this model do so already"
    elif reads_prompts_apart(model) or "cache" not in inspect.signature(model.forward).parameters:
        reason = f"{kind} does not read prompt and answer in one sequence with kept keys and values"
    layers = dict(expert_layers(model))
    for name, expert in named_experts(model):
        layer = layers.get(name)
        if layer is None or not isinstance(layer, nn.Linear | ExpertConv1D):
            reason = f"{name} is not a linear layer's weight"
        elif not (expert.mergeable or isinstance(expert, Mixture)):
            reason = f"the {type(expert).__name__} at {name} is not a delta: {expert.not_mergeable_because}"
        elif trains_weight(layer.expert):
            reason = f"{type(expert).__name__} trains the weight itself at {name}, so the base's is not in memory"
    if reason:
        raise ValueError(f"acts_on=answer: {reason}; leave acts_on out, or take LoRAExpert or SparseExpert")
