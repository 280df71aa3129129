"""What eight experts cost that answer about one text: ordinary ones, and ones that act on answers alone.

The server's engine answers with a Llama of 135 million parameters of random weights and random LoRAs of rank 16 in all
linear layers. A round is one of two works, of a text of 512 tokens and answers of 16:

* together: eight requests about the text at the same time, each with an expert of its own;
* in turn: a conversation of eight turns, each of which adds 20 tokens and is answered by another expert.

Experts of answers share the keys and values of what the base read. The ways take turns, each round with another text,
in one process on one thread; the numbers are ratios of medians of CPU time over the base alone, which shares them too.

    python benchmarks/shared_prompts.py [--json] [--quick]      5 minutes; --quick: in small, to see that it runs
"""

import argparse
import asyncio
import random
import tempfile
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contenders import language_model
from measuring import Parser, goal, medians, output, print_goals, print_machine, print_table

from modular_experts.deltas import LowRank
from modular_experts.injection import find_sites
from modular_experts.injection.answer_only import NOT_MERGEABLE_BECAUSE
from modular_experts.library import StoredExpert, make_record, open_expert, write_expert
from modular_experts.library.record import ANSWER
from modular_experts.serving.engine import Engine, Sampling
from modular_experts.serving.models import Weighted

WAYS = {"base": "the base alone", "ordinary": "ordinary experts", "answers": "experts of answers"}
EXPERTS = 8
TURN = 20
"""Tokens that a turn adds to a conversation."""


def write_experts(model: Any, place: Path, way: str) -> list[StoredExpert]:
    """Write random LoRAs that act in a way, and open them."""
    facts: dict[str, Any] = (
        {"acts_on": ANSWER, "not_mergeable_because": NOT_MERGEABLE_BECAUSE} if way == "answers" else {}
    )
    head = model.get_output_embeddings()
    weights = dict(model.named_parameters())
    shapes = {site.weight: weights[site.weight].shape for site in find_sites(model) if site.module is not head}
    for number in range(EXPERTS):
        deltas = {
            name: LowRank(0.01 * torch.randn(outs, 16), 0.01 * torch.randn(16, ins))
            for name, (outs, ins) in shapes.items()
        }
        record = make_record("LoRAExpert", {"id": "random", "fingerprint": "random"}, **facts)
        write_expert(place / f"{way}{number}", deltas, record)
    return [open_expert(place / f"{way}{number}") for number in range(EXPERTS)]


class Work:
    """Answers with the experts of a way, and a new text each time."""

    def __init__(self, model: Any, experts: list[StoredExpert], prompt: int, answer: int) -> None:
        self.engine = Engine(model)
        self.choices: list[Weighted] = [[(expert, 1.0)] for expert in experts] or [[] for _ in range(EXPERTS)]
        self.prompt = prompt
        self.answer = answer
        self.drawn = random.Random(0)
        self.vocabulary: int = model.config.vocab_size

    def tokens(self, count: int) -> list[int]:
        return self.drawn.choices(range(self.vocabulary), k=count)

    async def ask(self, ids: list[int], experts: Weighted) -> list[int]:
        return [token.id async for token in self.engine.answer(ids, experts, [], self.answer, Sampling())]

    async def together(self) -> None:
        ids = self.tokens(self.prompt)
        await asyncio.gather(*[self.ask(ids, experts) for experts in self.choices])

    async def in_turn(self) -> None:
        ids = self.tokens(self.prompt)
        for experts in self.choices:
            ids += await self.ask(ids, experts)
            ids += self.tokens(TURN)


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Return a row of ratios for each work."""
    prompt, answer, rounds = (128, 4, 1) if options.quick else (512, 16, 3)
    # The locks of an engine belong to one event loop.
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner() as runner:
        works: dict[str, Work] = {}
        for way in WAYS:
            torch.manual_seed(0)
            model: Any = language_model(options.quick).base
            experts = [] if way == "base" else write_experts(model, Path(folder), way)
            works[way] = Work(model, experts, prompt, answer)
        rows: list[dict[str, Any]] = []
        for name, work in {"together": Work.together, "in turn": Work.in_turn}.items():
            calls = {way: partial(_run, runner, partial(work, own)) for way, own in works.items()}
            seconds = medians(calls, rounds)
            rows.append({"work": name} | {way: seconds[way] / seconds["base"] for way in WAYS})
        for own in works.values():
            own.engine.stop()
    together = rows[0]
    goals = [goal("tokens a second of eight experts of answers over the base's", 1 / together["answers"], 0.95, True)]
    return {"rows": rows, "goals": goals}


def _run(runner: asyncio.Runner, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    runner.run(work())


def show(report: dict[str, Any]) -> None:
    """Print the table."""
    print_machine(report)
    print_table("CPU of answers about one text over the base's", report["rows"], WAYS)
    print_goals(report["goals"])


def main() -> None:
    options = Parser(__doc__, quick="a tiny model, a short text, one round: the numbers mean nothing").parse_args()
    torch.set_num_threads(1)
    output(options, compare(options), show)


if __name__ == "__main__":
    main()
