"""`adapt`: an expert of a new task from few rows and a library, chosen by rows that were left out."""

import pytest
import torch
from conftest import write_rows
from testbed.runs import TARGET

from modular_experts import LoRAExpert, Task, TaskMixture, adapt, fit, open_expert
from modular_experts.base import Base
from modular_experts.base.apply import applied
from modular_experts.data.batch import Collator
from modular_experts.evaluation import batch_losses
from modular_experts.library import open_experts
from modular_experts.merging.adapt import divided

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}


@pytest.fixture(scope="module")
def place(one_block, tmp_path_factory):
    """A library of an expert of the very mapping of the new task, and of an expert of another one."""
    place = tmp_path_factory.mktemp("adapt")
    for name, answers in (("same", "ab"), ("other", "zy"), ("new", "ab")):
        words = [f"{name[0]}{number:03d}{'pq'[number % 2]}" for number in range(12 if name == "new" else 60)]
        rows = [{"input": f"word {w}", "target": answers["pq".index(w[-1])], "split": "train"} for w in words]
        write_rows(place / f"{name}.jsonl", rows)
        if name != "new":
            how = {"steps": 60, "learning_rate": 0.03, "trainer": QUIET}
            fit(one_block, place / f"{name}.jsonl", LoRAExpert, TARGET, place / "library" / name, **how)
    return place


@pytest.fixture(scope="module")
def done(place):
    library = [place / "library/same", place / "library/other"]
    return adapt(library, place / "new.jsonl", place / "library/new", steps=4, folds=2)


def test_the_expert_of_the_same_mapping_is_the_nearest_and_its_loss_that_of_base_plus_delta(place, one_block, done):
    data = TaskMixture(place / "new.jsonl", tokenizer=str(one_block))
    (rows,) = data.examples("train").values()
    model = Base.open(one_block).load()
    with applied(model, place / "library/same"), torch.no_grad():
        sums, counts = batch_losses(model, Collator(data.row_tokenizer().pad_id, texts=False)(rows))
    assert done.starts["nearest"].loss(0) == pytest.approx(float(sums.sum() / counts.sum()), rel=1e-4)
    assert done.starts["nearest"].loss(0) < done.starts["base"].loss(0)
    assert done.helped
    assert "same" in done.weights
    assert done.steps == done.starts[done.chosen].best_steps
    assert "same" in [parent["name"] for parent in done.expert.record["parents"]]


def test_the_delta_is_that_of_the_start_plus_that_of_the_training(place, one_block):
    library = [place / "library/same", place / "library/other"]
    scratch: list = []

    class Kept(LoRAExpert):
        learning_rate = 0.01

        def delta(self, weight, anchor):
            scratch.append(super().delta(weight, anchor))
            return scratch[-1]

    made = adapt(library, place / "new.jsonl", place / "sum", Kept, TARGET, steps=4, folds=2)
    if made.steps:
        own = {name: made.weights.get(name, 0.0) for name in ("same", "other")}
        trained = dict(zip(made.expert, scratch, strict=True))
        for name, delta in made.expert.items():
            start = sum(share * open_expert(place / "library" / other)[name].dense() for other, share in own.items())
            torch.testing.assert_close(delta.dense(), start + trained[name].dense(), rtol=1e-4, atol=1e-6)


def test_an_adapted_expert_stands_alone(done, caplog):
    open_experts([done.expert.path])
    assert "will be missed" not in caplog.text


def test_the_same_seed_gives_the_same_expert(place, done):
    library = [place / "library/same", place / "library/other"]
    again = adapt(library, place / "new.jsonl", place / "again", steps=4, folds=2)
    assert open_expert(place / "again").content_hash == done.expert.content_hash == again.expert.content_hash


def test_each_row_is_left_out_once():
    parts = divided(10, 3, 1)
    assert sorted(row for part in parts for row in part.left_out) == list(range(10))
    assert all(not {*part.learned} & {*part.left_out} for part in parts)
    assert parts == divided(10, 3, 1) != divided(10, 3, 2)


def test_bad_input_is_refused_in_one_sentence(place, tmp_path):
    library = [place / "library/same"]
    one = write_rows(tmp_path / "one.jsonl", [{"input": "a", "target": "b", "split": "train"}])
    held_out = Task(path=str(place / "new.jsonl"), role="held_out")
    for tasks, sentence in ((one, "has 1 training row, and folds need"), (held_out, "reserved for the test")):
        with pytest.raises(ValueError, match=sentence):
            adapt(library, tasks, tmp_path / "x")
    with pytest.raises(FileExistsError):
        adapt(library, one, place / "library/same")
    assert not (tmp_path / "x").exists()
