"""A library of experts of every form on the tiny Llama, and answers of `generate`, for the tests of the server."""

import asyncio
import os
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from testbed import runs
from testbed.forked import ended, forked

from modular_experts.__main__ import main
from modular_experts.base import Base
from modular_experts.base.files import fingerprint
from modular_experts.data.chat import PromptReading, PromptReadings
from modular_experts.deltas import BlockSparse, Dense, LowRank, Sparse
from modular_experts.evaluation.streaming import generate
from modular_experts.injection.answer_only import NOT_MERGEABLE_BECAUSE
from modular_experts.library import StoredExpert, make_record, open_expert, write_expert
from modular_experts.library.record import ANSWER
from modular_experts.merging.route import route
from modular_experts.serving.engine import Engine, Sampling
from modular_experts.serving.models import Models


class Copy:
    """A command in a copy of this process, with the parts of `subprocess.Popen` that tests of a server need."""

    def __init__(self, *words: str) -> None:
        pipes = [os.pipe() for _ in range(2)]
        self.number = forked(_command, words, *(writing for _, writing in pipes))
        for _, writing in pipes:
            os.close(writing)
        self.stdout, self.stderr = (os.fdopen(reading) for reading, _ in pipes)

    def send_signal(self, signal: int) -> None:
        os.kill(self.number, signal)

    def wait(self, seconds: float) -> int:
        """Wait for the end; what it wrote to stderr is in `log` then."""
        status, self.log = ended(self.number, seconds), self.stderr.read()
        for pipe in (self.stdout, self.stderr):
            pipe.close()
        return status


def _command(words: Sequence[str], *pipes: int) -> int:
    for number, pipe in enumerate(pipes, 1):
        os.dup2(pipe, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    return main(list(words))


WEIGHTS = {
    "model.layers.0.self_attn.q_proj.weight": (32, 32),
    "model.layers.1.self_attn.v_proj.weight": (16, 32),
    "model.layers.1.mlp.down_proj.weight": (32, 48),
}


def delta(form: str, shape: Sequence[int], made: torch.Generator) -> Any:
    """Return a random delta that is large enough to change answers."""
    size, full = shape[0] * shape[1], torch.Size(shape)
    if form == "entries":
        indices = torch.randperm(size, generator=made)[: size // 4].sort().values.int()
        return Sparse(indices, torch.randn(size // 4, generator=made), full)
    if form == "tiles":
        blocks = torch.randperm(size // 16, generator=made)[: size // 64].sort().values.int()
        return BlockSparse(blocks, torch.randn(size // 64, 4, 4, generator=made), full)
    if form == "lora":
        return LowRank(torch.randn(shape[0], 2, generator=made), 0.5 * torch.randn(2, shape[1], generator=made))
    return Dense(0.5 * torch.randn(shape, generator=made))


def write(
    base: Path,
    place: Path,
    form: str,
    seed: int = 0,
    shapes: Mapping[str, Sequence[int]] = WEIGHTS,
    training: Mapping[str, Any] | None = None,
    on_answers: bool = False,
    **settings: Any,
) -> StoredExpert:
    """Write a random expert, and open it."""
    made = torch.Generator().manual_seed(seed)
    deltas = {weight: delta(form, shape, made) for weight, shape in shapes.items()}
    of = {"id": str(base), "revision": None, "fingerprint": fingerprint(base)}
    facts = {"acts_on": ANSWER, "not_mergeable_because": NOT_MERGEABLE_BECAUSE} if on_answers else {}
    record = make_record("SparseExpert", of, tasks=[place.name], training=training, **facts)
    write_expert(place, deltas, record, **settings)
    return open_expert(place)


LONG = "reverse the word " * 6
PROMPTS = ["upper word", LONG, "first of all", LONG + "x"]
FORMS = {"entries": "entries", "tiles": "tiles", "lora": "lora", "dense": "dense", "int4": "entries"}
ON_ANSWERS = {"answers": "lora", "few_answers": "entries"}
MODELS = ["base", *FORMS, *ON_ANSWERS, "entries+lora", "answers+few_answers", "lora"]


def make_library(base: Path, place: Path) -> Path:
    """Write an expert of each form, of the same weights, and some that act on answers alone."""
    for seed, (name, form) in enumerate(FORMS.items()):
        write(base, place / name, form, seed, encoding="int4" if name == "int4" else "float32")
    for seed, (name, form) in enumerate(ON_ANSWERS.items(), 20):
        write(base, place / name, form, seed, on_answers=True)
    return place


def router_of(
    base: Path, library: Path, files: Mapping[str, Path], seed: int = 10, on_answers: bool = False
) -> Callable[..., StoredExpert]:
    """Write an expert of each of two tasks; return a function that puts a router before them."""
    tasks = ("upper", "reverse")
    for number, name in enumerate(tasks):
        write(base, library / name, "lora", seed + number, on_answers=on_answers)

    def make(router: Any, name: str = "route", **settings: Any) -> StoredExpert:
        data = runs.mixture({one: files[one] for one in tasks}, base)
        return route([library / one for one in tasks], library / name, router, data=data, **settings)

    return make


def opened(base: Path, library: Path, **settings: Any) -> tuple[Engine, Models, Any]:
    """Return an engine on a base, the models of a library, and the base's tokenizer."""
    found = Base.open(str(base))
    models = Models(library, found.fingerprint, str(base))
    return Engine(found.load("float32"), **settings), models, found.tokenizer()


async def tokens_of(
    engine: Engine, models: Models, tokenizer: Any, prompt: str, model: str, most: int = 12, **sampling: Any
) -> list[Any]:
    """Return the tokens with which a model answers a prompt."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    choice = models.find(model)
    tokens = engine.answer(ids, choice.experts, [tokenizer.eos_token_id], most, Sampling(**sampling))
    return [token async for token in tokens]


def plainly(ids: Sequence[int], experts: int = 2) -> PromptReadings:
    """Return a prompt of these tokens, as experts that were trained without a template read it."""
    return PromptReadings({False: PromptReading(list(ids), [], False)}, [False] * experts, False)


def text_of(tokenizer: Any, tokens: Sequence[Any]) -> str:
    kept = [token.id for token in tokens]
    return str(tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)).strip()


def texts_of(engine: Engine, models: Models, tokenizer: Any, asked: Sequence[tuple[str, str]]) -> list[str]:
    """Return the answers of models to prompts, all of which are asked at once, and stop the engine."""

    async def all_at_once() -> list[list[Any]]:
        return await asyncio.gather(*[tokens_of(engine, models, tokenizer, *one) for one in asked])

    return [text_of(tokenizer, tokens) for tokens in run(engine, all_at_once())]


def generated(base: Path, library: Path, prompt: str, model: str, most: int = 12) -> str:
    """Return the answer of `generate` with the experts that a model names."""
    experts = [] if model == "base" else [library / name for name in model.split("+")]
    return generate(str(base), prompt, experts, most, chat_template=False)


def run(engine: Engine, work: Coroutine[Any, Any, Any]) -> Any:
    """Do some work with an engine, and stop it."""
    try:
        return asyncio.run(work)
    finally:
        engine.stop()
