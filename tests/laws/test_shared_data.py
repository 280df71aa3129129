"""A mixture that many calls have used acts as a fresh one in the next call, whatever these calls were.

Calls differ in what they ask of the data: a base of a shorter context, choices to compare, packed rows, inputs alone.
"""

import random
from collections.abc import Callable
from functools import partial
from itertools import count, cycle
from pathlib import Path

import pytest
from conftest import write_rows

from modular_experts import Distilled, TaskMixture, distill, evaluate, fit, look, open_expert, route, search, shrink
from modular_experts.experts import FullExpert, LoRAExpert, SparseExpert
from modular_experts.merging.gradient_search import ATLAS
from modular_experts.merging.objective import ValidationRows
from modular_experts.routing import Centroid
from modular_experts.training.preferences import DPO

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


@pytest.fixture(scope="module")
def calls(one_block, tiny, tmp_path_factory) -> tuple[Callable[[], TaskMixture], dict[str, Callable]]:
    """What makes a mixture, and calls that get one and return what must not depend on earlier calls."""
    place = tmp_path_factory.mktemp("shared")
    short = tiny("llama", num_hidden_layers=1, max_position_embeddings=16)
    numbers = count()
    draw = random.Random(0)
    for name in ("a", "b"):
        rows = [
            {
                "input": "".join(draw.choice("abcdef") for _ in range(draw.randint(2, 25))),
                "target": draw.choice(["yes", "no"]),
                "choices": ["yes", "no"],
                "split": ["train", "train", "validation", "test"][number % 4],
            }
            for number in range(20)
        ]
        write_rows(place / f"{name}.jsonl", rows)
        lora = partial(LoRAExpert, rank=2)
        fit(one_block, place / f"{name}.jsonl", lora, ["q_proj"], place / "library" / name, steps=2, trainer=QUIET)
    experts = [open_expert(place / "library" / name) for name in ("a", "b")]

    def out() -> Path:
        return place / str(next(numbers)) / "x"

    def trained(base: Path, expert: Callable, data: TaskMixture, **how: object) -> str:
        return fit(base, data, expert, ["q_proj"], out(), steps=3, trainer=QUIET, **how).content_hash

    def measured(base: Path, data: TaskMixture) -> list[dict]:
        return [dict(row) for row in evaluate(base, {"base": []}, data, 3).rows]

    found: dict[str, Callable[[TaskMixture], object]] = {
        "full": lambda data: trained(one_block, FullExpert, data),
        "packed": lambda data: trained(one_block, partial(SparseExpert, keep_ratio=0.2), data),
        "preferences": lambda data: trained(one_block, FullExpert, data, model={"loss": DPO()}),
        "short context": lambda data: trained(short, FullExpert, data),
        "evaluate": lambda data: measured(one_block, data),
        "evaluate, short context": lambda data: measured(short, data),
        "route": lambda data: route(experts, place / f"library/r{next(numbers)}", Centroid(), data=data).content_hash,
        "search": lambda data: search(experts, ATLAS(steps=2), data, out()).expert.content_hash,
        "few rows": lambda data: search(experts, ATLAS(steps=2), ValidationRows(data, 2), out()).expert.content_hash,
        "distill": lambda data: distill(experts, out(), Distilled(steps=2, max_new_tokens=2), data).expert.content_hash,
        "shrink": lambda data: [one.chosen.loss for one in shrink(experts[:1], data.only(["a"]), out().parent)],
        "look": lambda data: str(look(one_block, data)),
    }
    return lambda: TaskMixture([str(place / "a.jsonl"), str(place / "b.jsonl")]), found


def test_used_data_act_as_fresh_ones(calls) -> None:
    make, called = calls
    fresh = {name: call(make()) for name, call in called.items()}
    shared, earlier = make(), cycle(["preferences", "short context", "packed", "evaluate, short context"])
    for name, before in zip(called, earlier, strict=False):
        called[before](shared)
        assert called[name](shared) == fresh[name], f"{name} after {before}"
