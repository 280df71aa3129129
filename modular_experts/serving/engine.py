"""Answer many prompts at once, each with its own experts.

The rows are batched continuously by transformers: a row joins when there is room and leaves with its last token. Hooks
of the model give each row of a pass its experts before the pass, and choose its next token behind it.
"""

import asyncio
import copy
import itertools
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import ContinuousBatchingConfig, GenerationConfig

from modular_experts.library import StoredExpert
from modular_experts.routing.gates import Gates
from modular_experts.serving.experts import HeldExperts, NoRoomError, Slot
from modular_experts.serving.models import Weighted

transformers_log = logging.getLogger("ContinuousBatchingLogger")
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
    """A request that the model answers: its experts' slots with weights, and the notes of its hooks on its tokens."""

    slots: list[tuple[int, float]]
    sampling: Sampling
    told: list[Token] = field(default_factory=list)
    generator: torch.Generator | None = None


class SideThreads:
    """Calls functions that compute with torch one after the other, each in a thread that ends with the call.

    OpenMP keeps workers for every thread that has computed. As soon as there are more of them than cores, they sleep
    between two products instead of waiting awake, and each pass of the model takes longer.
    """

    def __init__(self) -> None:
        self._turn = asyncio.Lock()

    async def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
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

    def __init__(self, model: Any, rows: int = 32, cache_tokens: int = 16_384, expert_bytes: int = 2 * 2**30) -> None:
        if getattr(model.config, "attn_logit_softcapping", None):
            raise ValueError(
                f"{type(model).__name__} cannot be served, because transformers leaves out attn_logit_softcapping "
                "where it batches rows; ask it with generate"
            )
        self.model, self.rows, self.cache_tokens = model.eval(), rows, cache_tokens
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self.reader: nn.Module = copy.deepcopy(model, shared)
        self.experts = HeldExperts(model, expert_bytes, self._pause)
        self._manager: Any = None
        self._answering: dict[str, _Row] = {}
        self._numbers, self._turn, self._reading = itertools.count(), asyncio.Lock(), SideThreads()
        self._batch: tuple[list[tuple[str, int]], Gates | None] = [], None
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

    def start(self) -> None:
        """Begin to answer; a second call does nothing."""
        if self._manager is not None and self._manager.is_running():
            return
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
            # Rows of other experts have other keys and values for the same tokens.
            allow_block_sharing=False,
            # A row's experts are chosen in Python, between passes.
            use_async_batching=False,
            use_cuda_graph=False,
        )
        greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=1)
        with torch.inference_mode():
            self._manager = self.model.init_continuous_batching(greedy, settings)
            self._manager.start()

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
                "tokens that the server keeps; shorten them, or start it with more --cache_tokens"
            )

    async def answer(
        self, ids: Sequence[int], experts: Weighted, stops: Sequence[int], most: int, sampling: Sampling
    ) -> AsyncIterator[Token]:
        """Yield the tokens of an answer as they come, with the one of `stops` that ends it; at most `most`.

        Whoever leaves the iterator ends the answer: close it (`aclose`). `check` the experts before.
        """
        slots = await self._taken([expert for expert, _ in experts]) if experts else []
        key, tokens, finished = f"{next(self._numbers)}", asyncio.Queue[Any](), False
        row = _Row([(slot.number, weight) for slot, (_, weight) in zip(slots, experts, strict=True)], sampling)
        if sampling.temperature > 0:
            row.generator = torch.Generator().manual_seed(sampling.seed)
        self._answering[key] = row
        try:
            manager, count = await self._asked(key, partial(_replace, tokens), list(ids), most, list(stops)), 0
            while not finished:
                found = await _next(tokens, manager)
                finished = found.is_finished()
                if found.error is not None:
                    raise EngineError(found.error)
                for token in found.generated_tokens[count:]:
                    yield row.told[count] if sampling.logprobs is not None else Token(token)
                    count += 1
        finally:
            del self._answering[key]
            if not finished and self._manager is not None:
                self._manager.cancel_request(key)
                # transformers keeps the handlers of requests that it does not finish.
                self._manager.output_router.result_handlers.pop(key, None)
            self.experts.give_back(slots)

    async def _asked(self, key: str, tell: Callable[[Any], None], ids: list[int], most: int, stops: list[int]) -> Any:
        """Hand a request to the manager of the batch, and return it; one that failed is replaced."""
        while True:
            self.start()
            manager = self._manager
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

    def _pause(self) -> AbstractContextManager[Any]:
        running = self._manager is not None and self._manager.is_running()
        return self._manager.pause() if running else nullcontext()

    def _rows_of_pass(self) -> Iterator[tuple[Any, _Row | None]]:
        for one in self._manager.batch_processor.inputs_and_outputs.requests_in_batch:
            # A request that was cancelled may be in one more pass.
            yield one, self._answering.get(one.state.request_id)

    def _give_experts(self, model: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Before a pass, name the experts of each of its tokens `(1, tokens)`, which lie row by row."""
        rows = list(self._rows_of_pass())
        batch = [(one.state.request_id, one.query_length) for one, _ in rows]
        if self._batch[0] != batch:
            gates = _gates([(one.query_length, row.slots if row else []) for one, row in rows], model.device)
            self._batch = batch, gates
        self.experts.gates.gates = self._batch[1]

    def _choose_tokens(self, model: Any, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        """Behind a pass, make the chosen token of each row the likeliest one, which transformers takes."""
        choosing = [row for one, row in self._rows_of_pass() if one.has_new_token]
        if all(row is None or (row.generator is None and row.sampling.logprobs is None) for row in choosing):
            return
        logits = output.logits[0]
        places = range(len(choosing)) if "logits_to_keep" in named else named["logits_indices"].tolist()
        for place, row in zip(places, choosing, strict=False):
            if row is not None:
                token = choose(logits[place], row.sampling, row.generator)
                row.told.append(token)
                logits[place, token.id] = torch.inf


def _replace(tokens: "asyncio.Queue[Any]", found: Any) -> None:
    """Put what is found into a queue alone: it holds all tokens so far, and a slow reader leaves the others unread."""
    if not tokens.empty():
        tokens.get_nowait()
    tokens.put_nowait(found)


async def _next(tokens: "asyncio.Queue[Any]", manager: Any) -> Any:
    while True:
        try:
            async with asyncio.timeout(2):
                return await tokens.get()
        except TimeoutError:
            # A request that came while the manager failed is answered by nobody.
            if not manager.is_running():
                raise EngineError("the model has stopped") from None


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Token:
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


def _gates(rows: Sequence[tuple[int, Sequence[tuple[int, float]]]], device: torch.device) -> Gates | None:
    """Return the gates of rows, each with the number of its tokens and its experts; None if all take the base alone."""
    width = max((len(slots) for _, slots in rows), default=0)
    if width == 0:
        return None
    padded = [[*slots, *[(0, 0.0)] * (width - len(slots))] for _, slots in rows]
    counts = torch.tensor([count for count, _ in rows])
    ids = torch.tensor([[slot for slot, _ in slots] for slots in padded]).repeat_interleave(counts, 0)
    weights = torch.tensor([[weight for _, weight in slots] for slots in padded]).repeat_interleave(counts, 0)
    return Gates(ids.to(device), weights.to(device))
