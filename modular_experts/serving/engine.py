"""Answer many prompts at once, each with its own experts.

The rows are batched continuously by transformers: a row joins when there is room and leaves with its last token. Hooks
of the model give each row of a pass its experts before the pass, and choose its next token behind it.

Where the base alone reads a prompt, for itself or for experts that act on answers alone, rows share the keys and values
of what their prompts have in common, `PAGE` tokens at a time, also with rows that have left.
"""

import asyncio
import copy
import itertools
import logging
import os
import sys
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar, TypeVarTuple, cast

import torch
from torch import Tensor, nn
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.modeling_outputs import CausalLMOutput

from modular_experts.language_model import reads_prompts_apart
from modular_experts.library import StoredExpert
from modular_experts.routing.gates import Gates
from modular_experts.serving.experts import HeldExperts, NoRoomError, Slot
from modular_experts.serving.models import Weighted

if TYPE_CHECKING:
    from transformers.generation.continuous_batching import ContinuousBatchingManager
    from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs
    from transformers.generation.continuous_batching.requests import GenerationOutput, RequestState

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")
PAGE = 32
"""Tokens of a page of the cache."""
BATCH_TOKENS = 1024
"""The most tokens of a pass: longer prompts are read in parts, so that other rows need not wait for the whole."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest one, or above a temperature of 0 by chance, which `seed` decides.

    With `logprobs`, tokens come with the logarithms of their probabilities, and with so many of the likeliest ones.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    logprobs: int | None = None


class Token(NamedTuple):
    """A token of an answer; with `logprobs`, its logarithmic probability and the likeliest tokens with theirs."""

    id: int
    logprob: float | None = None
    likeliest: Sequence[tuple[int, float]] = ()


@dataclass(eq=False)
class _Row:
    """A request that the model answers: its experts' slots with weights, and the notes of its hooks on its tokens.

    The base alone reads the first `alone` tokens: all of them without experts, those before the prompt's last one for
    experts that act on answers alone, and otherwise none.
    """

    slots: list[tuple[int, float]]
    alone: int
    sampling: Sampling
    chosen: list[Token] = field(default_factory=list)
    generator: torch.Generator | None = None


class SideThreads:
    """Calls functions that compute with torch one after the other, each in a thread that ends with the call.

    OpenMP keeps workers for every thread that has computed. As soon as there are more of them than cores, they sleep
    between two products instead of waiting awake, and each pass of the model takes longer.
    """

    def __init__(self) -> None:
        self._turn = asyncio.Lock()

    async def call(self, function: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        """Return a function's result; a caller that is cancelled waits for the end of one that has begun."""
        async with self._turn:
            thread = ThreadPoolExecutor(1)
            running = asyncio.get_running_loop().run_in_executor(thread, function, *arguments)
            try:
                return await asyncio.shield(running)
            finally:
                await asyncio.wait([running])
                thread.shutdown(wait=False)


class EngineError(RuntimeError):
    """The model failed; the request may be sent again."""


class Engine:
    """A model that answers requests, from `start` to `stop`: up to `rows` of them in each pass.

    The keys and values of up to `cache_tokens` tokens of all rows are kept, and up to `expert_bytes` of experts.
    `reader` is the base alone, which reads prompts for routers; it shares its tensors with the model.
    """

    def __init__(
        self, model: PreTrainedModel, rows: int = 32, cache_tokens: int = 16_384, expert_bytes: int = 2 * 2**30
    ) -> None:
        if reads_prompts_apart(model):
            raise ValueError(
                f"{type(model).__name__} is not a causal language model, and requests are batched for these alone; ask "
                "it with generate"
            )
        if getattr(model.config, "attn_logit_softcapping", None):
            raise ValueError(
                f"{type(model).__name__} cannot be served, because transformers leaves out attn_logit_softcapping "
                "where it batches rows; ask it with generate"
            )
        self.model = model.eval()
        self.rows = rows
        self.cache_tokens = cache_tokens
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self.reader: nn.Module = copy.deepcopy(model, shared)
        self.experts = HeldExperts(model, expert_bytes, self._pause)
        self._manager: ContinuousBatchingManager | None = None
        self._answering: dict[str, _Row] = {}
        self._numbers = itertools.count()
        self._turn = asyncio.Lock()
        self._reading = SideThreads()
        # The rows of the last pass, and their gates.
        self._batch: list[tuple[str, int, int]] = []
        self._gates: Gates | None = None
        model.register_forward_pre_hook(self._give_experts, with_kwargs=True)
        model.register_forward_hook(self._choose_tokens, with_kwargs=True)

    def check_base(self) -> None:
        """Raise ValueError if transformers cannot batch the rows of this base; this answers a prompt of two tokens."""

        async def ask() -> None:
            async for _ in self.answer([0, 0], [], [-1], 2, Sampling()):
                pass

        transformers_log.setLevel(logging.CRITICAL)
        try:
            asyncio.run(ask())
        except Exception as error:
            self.stop()
            raise ValueError(
                "the base cannot be served, because transformers does not batch the rows of "
                f"{type(self.model).__name__} ({error}); ask it with generate"
            ) from error
        finally:
            transformers_log.setLevel(logging.ERROR)

    def start(self) -> "ContinuousBatchingManager":
        """Begin to answer, and return what batches the rows; a second call does nothing more."""
        if self._manager is not None and self._manager.is_running():
            return self._manager
        self.stop()
        # Its warnings quote tokens of prompts.
        transformers_log.setLevel(max(logging.ERROR, transformers_log.level))
        if self.model.device.type == "cpu":
            # Attention then reads the keys and values that several heads share without a copy for each head.
            os.environ.setdefault("TRANSFORMERS_SDPA_FORCE_GQA", "1")
        settings = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=-(-self.cache_tokens // PAGE),
            max_batch_tokens=BATCH_TOKENS,
            max_requests_per_batch=self.rows,
            # `_SharedPrompts` shares only the blocks that the base alone has read.
            allow_block_sharing=True,
            # A row's experts are chosen in Python, between passes.
            use_async_batching=False,
            use_cuda_graph=False,
        )
        greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=1)
        with torch.inference_mode():
            self._manager = self.model.init_continuous_batching(greedy, settings)
            _share_prompts(self._manager, self._answering)
            self._manager.start()
        return self._manager

    def stop(self) -> None:
        """End, with the answers that are not finished."""
        if self._manager is not None:
            self._manager.stop(block=True, hard_stop=True)
            self._manager = None

    @property
    def answering(self) -> int:
        """How many requests are being answered, or wait for their turn."""
        return len(self._answering)

    def check(self, experts: Sequence[StoredExpert], prompt: int, most: int) -> None:
        """Raise ValueError for experts that cannot be served, or an answer that the cache has no room for."""
        self.experts.check(experts)
        if prompt + most > self.cache_tokens:
            raise ValueError(
                f"the prompt of {prompt} tokens and an answer of up to {most} need more than the {self.cache_tokens} "
                "tokens that the server keeps; shorten them, or start it with more `cache_tokens=`"
            )

    async def answer(
        self, ids: Sequence[int], experts: Weighted, stops: Sequence[int], most: int, sampling: Sampling
    ) -> AsyncGenerator[Token, None]:
        """Yield the tokens of an answer as they come, with the one of `stops` that ends it; at most `most`.

        Whoever leaves the iterator ends the answer: close it (`aclose`). `check` the experts before.
        """
        slots = await self._taken([expert for expert, _ in experts]) if experts else []
        key = f"{next(self._numbers)}"
        outputs: asyncio.Queue[GenerationOutput] = asyncio.Queue()
        finished = False
        numbers = [(slot.number, weight) for slot, (_, weight) in zip(slots, experts, strict=True)]
        row = _Row(numbers, _tokens_of_the_base(len(ids), experts), sampling)
        if sampling.temperature > 0:
            row.generator = torch.Generator().manual_seed(sampling.seed)
        self._answering[key] = row
        try:
            manager = await self._asked(key, partial(_replace, outputs), list(ids), most, list(stops))
            count = 0
            while not finished:
                output = await _next(outputs, manager)
                finished = output.is_finished()
                if output.error is not None:
                    raise EngineError(output.error)
                for token in output.generated_tokens[count:]:
                    yield row.chosen[count] if sampling.logprobs is not None else Token(token)
                    count += 1
        finally:
            del self._answering[key]
            if not finished and self._manager is not None:
                self._manager.cancel_request(key)
                _forget_handler(self._manager, key)
            self.experts.give_back(slots)

    async def _asked(
        self, key: str, tell: "Callable[[GenerationOutput], None]", ids: list[int], most: int, stops: list[int]
    ) -> "ContinuousBatchingManager":
        """Hand a request to the manager of the batch, and return it; one that failed is replaced."""
        while True:
            manager = self.start()
            manager.register_result_handler(key, tell)
            if manager.add_request(ids, key, most, streaming=True, eos_token_id=stops or [-1]) is not None:
                return manager
            # It takes no more requests, and ends.
            await asyncio.sleep(0.05)

    async def _taken(self, experts: Sequence[StoredExpert]) -> list[Slot]:
        """Take experts, one request after the other, as soon as those that answer now leave room for them."""
        async with self._turn:
            while True:
                taking = asyncio.ensure_future(self._reading.call(self.experts.take, experts))
                try:
                    return await asyncio.shield(taking)
                except NoRoomError:
                    await asyncio.sleep(0.05)
                except asyncio.CancelledError:
                    # The thread goes on, and takes them for nobody.
                    taking.add_done_callback(self._give_back)
                    raise
                except Exception as error:
                    raise EngineError(str(error)) from error

    def _give_back(self, taken: "asyncio.Future[list[Slot]]") -> None:
        if not taken.cancelled() and taken.exception() is None:
            self.experts.give_back(taken.result())

    def _pause(self) -> AbstractContextManager[None]:
        if self._manager is not None and self._manager.is_running():
            return self._manager.pause()
        return nullcontext()

    def _give_experts(self, model: nn.Module, arguments: object, named: object) -> None:
        """Before a pass, name the experts of each of its tokens `(1, tokens)`, which lie row by row."""
        batch = []
        pieces: list[tuple[_Slots, int]] = []
        for part in _parts_of_pass(self._manager):
            # A request that was cancelled may be in one more pass.
            row = self._answering.get(part.key)
            alone = part.tokens if row is None else min(max(row.alone - part.start, 0), part.tokens)
            batch.append((part.key, alone, part.tokens))
            pieces += [([], alone), (row.slots if row is not None else [], part.tokens - alone)]
        if self._batch != batch:
            self._batch = batch
            self._gates = _gates(pieces, self.model.device)
        self.experts.gates.gates = self._gates

    def _choose_tokens(
        self, model: nn.Module, arguments: object, named: Mapping[str, Tensor], output: CausalLMOutput
    ) -> None:
        """Behind a pass, make the chosen token of each row the likeliest one, which transformers takes."""
        choosing = [self._answering.get(part.key) for part in _parts_of_pass(self._manager) if part.gets_token]
        if all(row is None or (row.generator is None and row.sampling.logprobs is None) for row in choosing):
            return
        assert output.logits is not None
        logits = output.logits[0]
        for place, row in zip(_places_of_logits(named, len(choosing)), choosing, strict=False):
            if row is not None:
                token = choose_token(logits[place], row.sampling, row.generator)
                row.chosen.append(token)
                logits[place, token.id] = torch.inf


# What the engine uses of transformers' batches that its documentation does not name, as version 5.24 has it.
transformers_log = logging.getLogger("ContinuousBatchingLogger")


class _PartOfPass(NamedTuple):
    """A request's part of the pass that runs: its tokens, how many were read before them, and whether one is chosen."""

    key: str
    tokens: int
    start: int
    gets_token: bool


def _parts_of_pass(manager: "ContinuousBatchingManager | None") -> list[_PartOfPass]:
    assert manager is not None
    assert manager.batch_processor is not None
    inputs = cast("ContinuousBatchingIOs", manager.batch_processor.inputs_and_outputs)
    parts = []
    for part in inputs.requests_in_batch:
        start = part.state.position_offset - part.query_length
        parts.append(_PartOfPass(part.state.request_id, part.query_length, start, part.has_new_token))
    return parts


def _places_of_logits(named: Mapping[str, Tensor], rows: int) -> Sequence[int]:
    """Return where the logits of rows lie in the output of a pass with these arguments."""
    return range(rows) if "logits_to_keep" in named else named["logits_indices"].tolist()


class _SharedPrompts(PagedAttentionCache):
    """Shares the keys and values of tokens that the base alone has read among rows whose texts begin alike.

    Blocks of other tokens stay their row's, because other experts have other keys and values for the same tokens.
    """

    rows: Mapping[str, _Row]

    def search_prefix_match(self, request_id: str, prompt_ids: list[int]) -> int:
        # The last of the tokens that it gets is never among those found.
        return super().search_prefix_match(request_id, prompt_ids[: self._alone(request_id) + 1])

    def mark_complete_blocks(self, state: "RequestState", complete_blocks: dict[str, int]) -> None:
        tokens = (state.initial_tokens + state.generated_tokens)[: self._alone(state.request_id)]
        for name, count in complete_blocks.items():
            self.cache_allocators[name].mark_complete_blocks(state.request_id, tokens, count)

    def _alone(self, request_id: str) -> int:
        row = self.rows.get(request_id)
        return 0 if row is None else row.alone


def _share_prompts(manager: "ContinuousBatchingManager", rows: Mapping[str, _Row]) -> None:
    manager.warmup()
    assert manager.batch_processor is not None
    cache = cast(_SharedPrompts, manager.batch_processor.cache)
    cache.__class__ = _SharedPrompts
    cache.rows = rows


def _forget_handler(manager: "ContinuousBatchingManager", key: str) -> None:
    """Let the handler of a request go, which transformers keeps if it does not finish the request."""
    manager.output_router.result_handlers.pop(key, None)


def _replace(outputs: "asyncio.Queue[GenerationOutput]", output: "GenerationOutput") -> None:
    """Put an output into a queue alone: it holds all tokens so far, and a slow reader leaves the others unread."""
    if not outputs.empty():
        outputs.get_nowait()
    outputs.put_nowait(output)


async def _next(outputs: "asyncio.Queue[GenerationOutput]", manager: "ContinuousBatchingManager") -> "GenerationOutput":
    while True:
        try:
            async with asyncio.timeout(2):
                return await outputs.get()
        except TimeoutError:
            # A request that came while the manager failed is answered by nobody.
            if not manager.is_running():
                raise EngineError("the model has stopped") from None


def choose_token(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Token:
    """Return the next token for the logits of the vocabulary `(size,)`; without a generator the likeliest one."""
    logits = logits.float()
    if generator is None:
        chosen = int(logits.argmax())
    else:
        # A very low temperature would make the quotients infinite.
        shares = ((logits - logits.max()) / max(sampling.temperature, 1e-6)).softmax(0)
        ordered, order = shares.sort(descending=True, stable=True)
        # The likeliest token stays, and each one before which less than `top_p` lies.
        shares[order[1:][ordered.cumsum(0)[:-1] >= sampling.top_p]] = 0
        # The first of several exponential clocks rings with a probability that is in proportion to its rate.
        clocks = torch.empty(len(shares)).exponential_(generator=generator).to(shares.device)
        chosen = int((shares / clocks).argmax())
    if sampling.logprobs is None:
        return Token(chosen)
    logprobs = logits.log_softmax(0)
    most = logprobs.topk(min(sampling.logprobs, len(logprobs)))
    return Token(chosen, float(logprobs[chosen]), list(zip(most.indices.tolist(), most.values.tolist(), strict=True)))


_Slots = list[tuple[int, float]]
"""Experts by the numbers of their slots, and how much of each."""


def _gates(pieces: Sequence[tuple[_Slots, int]], device: torch.device) -> Gates | None:
    """Return the gates of tokens, for each piece its experts and how many tokens take them; None for the base alone."""
    pieces = [(slots, tokens) for slots, tokens in pieces if tokens]
    width = max((len(slots) for slots, _ in pieces), default=0)
    if width == 0:
        return None
    # Tokens with fewer experts than others take some of weight 0.
    ids = torch.zeros(len(pieces), width, dtype=torch.int64)
    weights = torch.zeros(len(pieces), width)
    for place, (slots, _) in enumerate(pieces):
        for column, (slot, weight) in enumerate(slots):
            ids[place, column] = slot
            weights[place, column] = weight
    counts = torch.tensor([tokens for _, tokens in pieces])
    return Gates(ids.repeat_interleave(counts, 0).to(device), weights.repeat_interleave(counts, 0).to(device))


def _tokens_of_the_base(prompt: int, experts: Weighted) -> int:
    """Return how many of the first tokens the base alone reads, for a prompt of so many tokens."""
    if not experts:
        return sys.maxsize
    return prompt - 1 if experts[0][0].acts_on_answers else 0
