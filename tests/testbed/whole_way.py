"""What an expert that states a delta goes through on the command line, for the tests of several types."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from modular_experts.library import StoredExpert, open_expert


def fit_beside_another(run: Callable, base: Path, mine: Sequence[Any], other: Sequence[Any]) -> StoredExpert:
    """Train `library/mine` and `library/other` by the given options, each on a task of its own; return the first."""
    for name, options in {"mine": mine, "other": other}.items():
        tasks = json.dumps([{"name": name, "path": "a.jsonl" if name == "mine" else "b.jsonl"}])
        more = ["--tasks", tasks, "--out", f"library/{name}", "--trainer.max_steps", 6]
        assert run("fit", "--model.base", base, *options, *more)[0] == 0
    return open_expert("library/mine")


def merge_and_apply(run: Callable, base: Path) -> None:
    """Merge both experts to `library/both`, and check that the first has the same loss in and beside the weights."""
    merging = ["merge", "--experts", "library/mine", "library/other", "--method", "Average", "--out", "library/both"]
    assert run(*merging)[0] == 0
    apply_and_test(run, base, "library/mine")


def apply_and_test(run: Callable, base: Path, expert: str) -> None:
    """Check that an expert has the same loss in the weights of a written checkpoint and beside the base's."""
    assert run("apply", "--base", base, "--experts", expert, "--out", "applied")[0] == 0
    losses = []
    for number, model in enumerate(([base, "--model.applied", f"[{expert}]"], ["applied"])):
        tested = ["test", "--model.base", *model, "--tasks", json.dumps([{"name": "mine", "path": "a.jsonl"}])]
        assert run(*tested, "--model.max_new_tokens", 2)[0] == 0
        results = Path("runs") / ("results.json" if not number else f"results-{number + 1}.json")
        losses.append(json.loads(results.read_text())["held_in"]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def push_and_pull(run: Callable, stored: StoredExpert) -> StoredExpert:
    """Push the first expert and the merged one, and return the first as it comes back."""
    assert run("push", "--experts", "library/mine", "library/both", "--repo", "someone/experts")[0] == 0
    assert run("pull", "--repo", "someone/experts", "--out", "pulled", "--experts", "mine")[0] == 0
    pulled = open_expert("pulled/mine")
    assert pulled.content_hash == stored.content_hash
    return pulled
