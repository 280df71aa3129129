"""Read the prompts of a batch as vectors, and make the gates of a forward pass of them."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modular_experts.language_model import acts_on_answers, blocks_of, prompt_reader, reads_prompts_apart
from modular_experts.routing.gates import CurrentGates, Gates, rows_at_hand
from modular_experts.routing.router import GRAMS, Router, TextRouter

Named = Mapping[str, Any]
"""The keyword arguments of a forward pass."""


class PromptGates:
    """Makes the gates of each forward pass of a model, as its forward pre-hook with keyword arguments.

    Before the pass, the prompts are read in a pass of their own over the first transformer blocks. A pass that goes on
    with kept keys and values keeps the gates of its prompts. Where rows are packed, or some of them go on, `reading`
    must tell the row of each place. `allowed` limits the choice to some of the experts, as `gates_among` does.

    Where experts act on answers alone, `AnswerOnly` calls `choose` as it reads prompts, in place of the hook.
    """

    def __init__(self, router: Router, current: CurrentGates) -> None:
        self.router = router
        self.current = current
        self.allowed: Tensor | None = None
        self._inside = False
        self._of_rows: Gates | None = None
        self._growth = Growth()
        current.packs = True

    def __call__(self, model: nn.Module, arguments: tuple[Tensor, ...], named: Named) -> None:
        row = rows_at_hand().row
        if self._inside:
            return
        if kept_tokens(named):
            if row is not None and self._of_rows is not None:
                self.current.gates = self._of_rows.of_places(row)
            return
        ids = named["input_ids"] if "input_ids" in named else next(iter(arguments), None)
        if ids is None:
            raise ValueError("a router reads prompts as `input_ids`, and the model was called without them")
        if row is None:
            check_rows(named)
        rows = named.get("attention_mask") if row is None else Packs(row, named["position_ids"])
        prompt = prompts_at_hand(ids.shape[1])
        self._growth.check(ids, named)
        self.choose(model, ids, rows, prompt)
        if row is not None and self._of_rows is not None:
            self.current.gates = self._of_rows.of_places(row)

    def choose(
        self,
        model: nn.Module,
        ids: Tensor,
        mask: "Tensor | Packs | None" = None,
        prompt: Tensor | None = None,
        cache: Any = None,
    ) -> None:
        """Read prompts by the base alone, with `prompt_vectors`' arguments, and make their gates."""
        # Without gates, a mixture is the base alone.
        self.current.gates = None
        self._inside = True
        try:
            vectors = vectors_for(self.router, model, ids, mask, prompt, cache)
        finally:
            self._inside = False
        self._of_rows = gates_among(self.router.to(vectors.device), vectors, self.allowed)
        self.current.gates = self._of_rows


def vectors_for(
    router: Router,
    model: nn.Module,
    ids: Tensor,
    mask: "Tensor | Packs | None" = None,
    prompt: Tensor | None = None,
    cache: Any = None,
) -> Tensor:
    """Return what a router of scope `sample` reads of each prompt, `(rows, size)`, with `prompt_vectors`' arguments."""
    parts = prompt_vectors(model, ids, mask, router.depths, prompt, cache)
    if isinstance(router, TextRouter) and router.encoder is not None:
        if router.encode is None:
            raise ValueError(
                f"the encoder {router.encoder} is not open; set encode=SentenceEncoder({router.encoder!r})"
            )
        parts.append(router.encode(model, prompt_tokens(ids, mask, prompt)))
    if router.reads_grams:
        parts.append(prompt_grams(ids, mask, prompt).to(parts[0].device))
    return torch.cat(parts, 1)


def gates_among(router: Router, vectors: Tensor, allowed: Tensor | None = None) -> Gates:
    """Return a router's gates of prompts `(rows, size)` when only some experts may answer.

    `allowed`, `(experts,)` bool, names these experts; None allows all. The router rejects the same prompts either way.
    """
    gates = router(vectors)
    if allowed is None:
        return gates
    # A score of minus infinity leaves an expert with a weight of 0, whatever selection makes the gates.
    scores = router.scores(vectors).float().masked_fill(~allowed.to(vectors.device), -torch.inf)
    return router.select(scores).without(is_rejected(router, gates), router.experts)


def is_rejected(router: Router, gates: Gates) -> Tensor:
    """Return which inputs a router has sent to its fallback alone, `(rows,)` bool."""
    return ((gates.ids == router.experts) | (gates.weights == 0)).all(1)


def rejection_notice(fallback: str | None) -> str:
    """Say that the router rejects a prompt and what answers it: the fallback of this name, or the base."""
    return f"no expert takes this prompt; {fallback or 'the base'} answers"


class FormChoice(NamedTuple):
    """The form in which a prompt is answered, and how well each expert fits the prompt in its own form.

    Attributes:
        is_chat: Whether the answer goes through the chat template; None if the router rejects the prompt in every form.
        scores: The experts' scores `(experts,)`, each for the prompt as that expert reads prompts.
        allowed: The experts that read prompts in this form, `(experts,)` bool.
    """

    is_chat: bool | None
    scores: Tensor
    allowed: Tensor


def choose_form(router: Router, vectors: Mapping[bool, Tensor], reads_chat: Sequence[bool]) -> FormChoice:
    """Choose between a prompt's chat and plain form where experts were trained on either: the best expert decides.

    Args:
        router: A router of scope `sample`.
        vectors: What the router reads of the prompt through the chat template (True) and without it (False), each
            `(1, size)`.
        reads_chat: Whether each expert reads prompts through the template.
    """
    chat = torch.tensor(list(reads_chat), device=next(iter(vectors.values())).device)
    scores = chat.new_zeros(len(chat), dtype=torch.float32)
    rejected = torch.zeros_like(chat)
    for is_chat, read in vectors.items():
        own = chat == is_chat
        scores = torch.where(own, router.scores(read).float()[0], scores)
        rejected |= own & is_rejected(router, router(read))
    if rejected.all():
        return FormChoice(None, scores, torch.ones_like(chat))
    best = int(scores.masked_fill(rejected, -torch.inf).argmax())
    return FormChoice(bool(chat[best]), scores, chat == chat[best])


def kept_tokens(named: Named) -> int:
    """Return for how many tokens a pass with these arguments gets kept keys and values; 0 for a new prompt."""
    caches = [named[name] for name in ("past_key_values", "cache") if hasattr(named.get(name), "get_seq_length")]
    return max((int(cache.get_seq_length()) for cache in caches), default=0)


class Growth:
    """Notices an answer that grows in passes without kept keys and values, and would be read as prompt."""

    def __init__(self) -> None:
        self._before: Tensor | None = None

    def check(self, ids: Tensor, named: Named) -> None:
        """Raise ValueError if ids `(rows, length)` add a token to the last pass's, and `reading` tells of no prompt."""
        before = self._before
        self._before = None
        if rows_at_hand().prompt is not None or named.get("use_cache") is not False:
            return
        self._before = ids
        if before is not None and before.shape == ids[:, :-1].shape and bool((before == ids[:, :-1]).all()):
            raise ValueError(
                "without kept keys and values the experts would read the growing answer as prompt; generate with "
                "use_cache=True, or inside `with modular_experts.routing.gates.reading(prompt)`"
            )


def check_rows(named: Named) -> None:
    """Raise ValueError if a pass with these keyword arguments packs several rows in one, so that prompts are mixed."""
    places = named.get("position_ids")
    if named.get("attention_mask") is None and places is not None and bool((places[..., 1:] == 0).any()):
        raise ValueError("this expert reads whole prompts, which it cannot in packed rows; leave data.packing out")


def prompts_at_hand(length: int) -> Tensor | None:
    """Return which places of the pass at hand hold prompts, `(rows, length)`; None where `reading` tells nothing."""
    # Places behind those that `reading` tells of hold an answer, which is read again without kept keys and values.
    prompt = rows_at_hand().prompt
    return None if prompt is None else F.pad(prompt, (0, length - prompt.shape[1]))


class Packs(NamedTuple):
    """The row of each place of a packed batch, and its place in it, both `(packs, length)`."""

    row: Tensor
    places: Tensor


@torch.no_grad()
def prompt_vectors(
    model: nn.Module,
    ids: Tensor,
    mask: Tensor | Packs | None,
    depths: Sequence[float],
    prompt: Tensor | None = None,
    cache: Any = None,
) -> list[Tensor]:
    """Return each prompt as a vector of length 1 for each depth, `(rows, size)` float32.

    It is the mean over the prompt's tokens, without the first, of the hidden states after a share of the transformer
    blocks, from 0, the embeddings, to 1; `depths` rise. The pass runs without dropout and ends at the deepest one; with
    an empty `cache` it goes through the whole model, and leaves the keys and values of all tokens there.
    Token ids `(rows, length)` may be padded on either side, where the `mask` has 0, or packed, `(packs, length)`. The
    tokens of the prompts are true in `prompt`, or all.
    """
    if hasattr(model, "unshard"):
        raise ValueError(
            "a router that reads prompts runs a part of the model, for which FSDP2 gathers no weights; leave out "
            "shard_base"
        )
    reader = prompt_reader(model)
    body: nn.Module = getattr(reader, "base_model", reader)
    parameters = inspect.signature(body.forward).parameters
    inputs: dict[str, object] = {"input_ids": ids}
    if "use_cache" in parameters or reader is model:
        inputs["use_cache"] = cache is not None
    if cache is not None:
        inputs["cache"] = cache
    if isinstance(mask, Packs):
        inputs["position_ids"] = mask.places
    else:
        inputs["attention_mask"] = mask
        is_encoder = reads_prompts_apart(model) and not acts_on_answers(model)
        if mask is not None and "position_ids" in parameters and not is_encoder:
            # Padding on the left must not move the places; encoders, which have it on the right, count by themselves.
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    with cast(Any, model).answer_only.base_alone() if acts_on_answers(model) else nullcontext():
        states = _hidden_states(body, inputs, depths)
    inside = _inside_prompts(ids, mask, prompt)
    # The first token attends to itself alone, so its state, which is the largest by far, is nearly the same everywhere.
    # It counts only in a prompt of one token.
    if isinstance(mask, Packs):
        later = inside & (mask.places > 0)
        sizes = torch.bincount(mask.row[later], minlength=int(mask.row.max()) + 1)
        counted = later | (inside & (sizes[mask.row] == 0))
        zeros = torch.zeros(len(sizes), states[0].shape[-1], device=ids.device)
        sums = [zeros.index_add(0, mask.row[counted], hidden.float()[counted]) for hidden in states]
    else:
        counted = inside & ((inside.cumsum(1) > 1) | (inside.sum(1, keepdim=True) < 2))
        zero = torch.zeros((), device=ids.device)
        sums = [hidden.float().where(counted[..., None], zero).sum(1) for hidden in states]
    return [F.normalize(total, dim=1) for total in sums]


def prompt_tokens(ids: Tensor, mask: Tensor | Packs | None, prompt: Tensor | None = None) -> list[list[int]]:
    """Return the tokens of each prompt; `prompt_vectors` has the same arguments."""
    inside = _inside_prompts(ids, mask, prompt)
    if isinstance(mask, Packs):
        rows = range(int(mask.row.max()) + 1)
        return [ids[inside & (mask.row == row)].tolist() for row in rows]
    return [line[own].tolist() for line, own in zip(ids, inside, strict=True)]


def prompt_grams(ids: Tensor, mask: Tensor | Packs | None, prompt: Tensor | None = None) -> Tensor:
    """Return each prompt's tokens and pairs of neighbouring tokens as a vector of length 1, `(rows, GRAMS)` float32.

    A hash gives each its place and its sign, so that inner products are right on average (Weinberger et al., arXiv
    0902.2206); a place has the signed logarithm `log(1 + n)` of the sum there. `prompt_vectors` has the same arguments.
    """
    inside = _inside_prompts(ids, mask, prompt)
    lines = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
    row = mask.row if isinstance(mask, Packs) else lines
    pairs = inside[:, 1:] & inside[:, :-1] & (row[:, 1:] == row[:, :-1])
    keys = torch.cat([ids[inside], (ids[:, :-1][pairs] + 1) * 2**32 + ids[:, 1:][pairs]])
    for factor in (-4658895280553007687, -7723592293110705685):
        # The finaliser of splitmix64; the mask makes the shift a logical one.
        keys = (keys ^ (keys >> 30 & (1 << 34) - 1)) * factor
    places = torch.cat([row[inside], row[:, 1:][pairs]]) * GRAMS + (keys >> 32) % GRAMS
    signs = (keys >> 62 & 1) * 2.0 - 1
    sums = torch.zeros((int(row.max()) + 1) * GRAMS, device=ids.device).index_add(0, places, signs)
    return F.normalize((sums.sign() * sums.abs().log1p()).view(-1, GRAMS), dim=1)


def _inside_prompts(ids: Tensor, mask: Tensor | Packs | None, prompt: Tensor | None) -> Tensor:
    """Return which places hold tokens of prompts, in the shape of the ids, bool."""
    if mask is None:
        tokens = torch.ones_like(ids, dtype=torch.bool)
    elif isinstance(mask, Packs):
        tokens = mask.row >= 0
    else:
        tokens = mask.bool()
    return tokens if prompt is None else tokens & prompt


def _hidden_states(body: nn.Module, inputs: Named, depths: Sequence[float]) -> list[Tensor]:
    """Return the hidden states at each of the depths, by a pass that ends at the deepest unless it keeps a cache."""
    blocks = blocks_of(body)
    numbers = [round(depth * len(blocks)) for depth in depths]
    states: dict[int, list[Tensor]] = {}
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(body))
        for number in dict.fromkeys(numbers):
            ends = number == max(numbers) and "cache" not in inputs
            behind = number == len(blocks)
            block = body.get_submodule(blocks[-1] if behind else blocks[number])
            states[number] = stack.enter_context(states_at(block, behind, ends))
        body(**inputs)
    return [states[number][0] for number in numbers]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Turn off dropout in a model while the context is open; each module then has the mode that it had before."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def states_at(block: nn.Module, behind: bool = False, ends: bool = True) -> Iterator[list[Tensor]]:
    """Put the hidden states of a forward pass before a transformer block, or behind it, into the list.

    The pass ends there if it `ends`.
    """
    reached: list[Tensor] = []

    def note(states: Tensor) -> None:
        reached.append(states)
        if ends:
            raise _Reached

    def before(_: nn.Module, arguments: tuple[Tensor, ...], named: Named) -> None:
        note(arguments[0] if arguments else named["hidden_states"])

    def after(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        note(output if isinstance(output, Tensor) else output[0])

    hook = block.register_forward_hook(after) if behind else block.register_forward_pre_hook(before, with_kwargs=True)
    try:
        with suppress(_Reached):
            yield reached
    finally:
        hook.remove()


class _Reached(Exception):
    """Ends a forward pass at the block whose hidden states are wanted."""
