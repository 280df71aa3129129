"""`search` with PathSearch: paths of a GLoRA under a limit, repeated and resumed exactly; GLoRA goes the whole way."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import TARGETS

from modular_experts.base import Base
from modular_experts.data import TaskMixture
from modular_experts.injection.attach import attached
from modular_experts.library import open_expert
from modular_experts.merging.objective import Objective, ValidationRows
from modular_experts.systems.glora.search import PathSearch

RANDOM_PATHS = ["--trainer.callbacks", json.dumps([{"class_path": "RandomPaths"}])]
SEARCH = ["search", "--experts", "library/a", "--algorithm", "PathSearch"]
SMALL = ["--tasks", "a.jsonl", "--out", "library/small"]


def trained(run, base) -> None:
    """Train a GLoRA on random paths, as `library/a`."""
    place = ["--model.base", base, "--model.modules", TARGETS["llama"], "--out", "library/a"]
    how = ["--model.expert", "GLoRAExpert", *RANDOM_PATHS, "--trainer.max_steps", 12]
    code, _, err = run("fit", *place, *how, "--tasks", "a.jsonl", "--model.learning_rate", 0.02)
    assert code == 0, err


def data() -> TaskMixture:
    return TaskMixture([{"name": "a", "path": "a.jsonl"}])


def objective_of(base: Path) -> Objective:
    opened, mixture = Base.open(base), data()
    mixture.tokenizer, mixture.eval_limit = opened.tokenizer(), 64
    return Objective(opened.load(), mixture)


def test_the_best_paths_under_a_limit_are_written_as_an_expert(run, tiny_llama_dir, two_task_files) -> None:
    trained(run, tiny_llama_dir)
    code, out, err = run(*SEARCH, "--algorithm.limit=600", "--algorithm.evaluations=40", "--algorithm.first=10", *SMALL)
    assert (code, err) == (0, "")
    assert "of 2,304 trained numbers: validation loss" in out
    whole, small = open_expert("library/a"), open_expert("library/small")
    numbers = sum(tensor.numel() for tensor in small.state().values())
    assert numbers == small.record["hyperparameters"]["numbers"] <= 600
    assert sum(tensor.numel() for tensor in whole.state().values()) == 2304
    trials = json.loads(Path("library/small/trials.json").read_text())
    assert len(trials) == 40
    assert small.record["scores"]["val_loss"] == min(trial["loss"] for trial in trials)
    objective = objective_of(tiny_llama_dir)
    with attached(objective.model, small):
        assert objective.losses()["a"] == pytest.approx(small.record["scores"]["val_loss"], rel=1e-5)
    assert not Path("library/small.losses.jsonl").exists()


class Stopped(Exception):
    pass


def test_a_search_repeats_and_goes_on_after_an_interruption(run, tiny_llama_dir, two_task_files) -> None:
    trained(run, tiny_llama_dir)
    algorithm = PathSearch(limit=700, evaluations=20, first=5)

    def stop(names):
        yield from names[:8]
        raise Stopped

    whole = algorithm.run(["library/a"], data(), "library/whole")
    with pytest.raises(Stopped):
        algorithm.run(["library/a"], data(), "library/again", progress=stop)
    stored = Path("library/again.losses.jsonl").read_text().splitlines()
    assert len(stored) == 1 + 8
    with pytest.raises(ValueError, match=r"again\.losses\.jsonl holds losses of another expert or of other rows"):
        algorithm.run(["library/a"], ValidationRows(data(), rows=1), "library/again")
    again = algorithm.run(["library/a"], data(), "library/again")
    assert again.paths == whole.paths
    assert again.losses == whole.losses
    assert Path("library/again/trials.json").read_text() == Path("library/whole/trials.json").read_text()
    for name, delta in again.expert.items():
        assert torch.equal(delta.dense(), whole.expert[name].dense())
    # The smaller expert has paths of its own.
    smaller = PathSearch(limit=200, evaluations=5, first=2).run(["library/again"], data(), "library/smaller")
    assert smaller.numbers <= 200
    assert smaller.most == again.numbers


def test_experts_beneath_are_in_the_model_while_paths_are_searched(run, tiny_llama_dir, two_task_files) -> None:
    place = ["--model.base", tiny_llama_dir, "--model.modules", TARGETS["llama"], "--tasks", "a.jsonl"]
    how = ["--trainer.max_steps", 12, "--model.learning_rate", 0.02]
    assert run("fit", *place, *how, "--model.expert", "LoRAExpert", "--out", "library/under")[0] == 0
    on_top = [*RANDOM_PATHS, "--model.applied", "[library/under]"]
    assert run("fit", *place, *how, "--model.expert", "GLoRAExpert", *on_top, "--out", "library/a")[0] == 0
    search = [*SEARCH, "--algorithm.limit=900", "--algorithm.evaluations=8", "--algorithm.first=4", *SMALL]
    code, out, err = run(*search)
    assert (code, err) == (0, "")
    assert "of the base with under" in out
    objective, losses = objective_of(tiny_llama_dir), {}
    for experts in (["under"], ["under", "a"], ["under", "small"], ["a"]):
        with attached(objective.model, [f"library/{name}" for name in experts]):
            losses[experts[-1] if experts != ["a"] else "alone"] = objective.losses()["a"]
    trials = json.loads(Path("library/small/trials.json").read_text())
    small = open_expert("library/small")
    assert small.record["parents"] == open_expert("library/a").record["parents"]
    assert small.record["scores"]["val_loss"] == pytest.approx(losses["small"], rel=1e-5)
    shown = [float(word) for word in re.findall(r"\d\.\d{4}", out)]
    assert shown == pytest.approx([losses["small"], losses["a"], losses["under"]], abs=2e-4)
    assert abs(losses["alone"] - losses["a"]) > 0.01
    assert len(trials) == 8
    Path("library/under").rename("library/over")
    code, _, err = run(*search[:-1], "library/again")
    assert code == 1
    assert "a was made with under, which is missing beside it" in err
