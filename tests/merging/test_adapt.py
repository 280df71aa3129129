"""`adapt`: an expert of a new task from few rows and a library, chosen by rows that were left out."""

import json
import re
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import write_rows
from testbed.runs import TARGET

from modular_experts import LoRAExpert, Task, TaskMixture, adapt, fit, open_expert
from modular_experts.__main__ import main
from modular_experts.base import Base
from modular_experts.base.apply import applied
from modular_experts.data.batch import Collator
from modular_experts.evaluation import batch_losses
from modular_experts.library import open_experts, write_expert
from modular_experts.merging.adapt import Start, _Rows, _weighted, divided

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
    same, other = (done.alone[str(place / "library" / name)] for name in ("same", "other"))
    assert same == pytest.approx(float(sums.sum() / counts.sum()), rel=1e-4)
    assert same < min(other, done.starts["base"].loss(0))
    assert done.chosen == "neighbours"
    assert next(iter(done.weights)) == str(place / "library/same")
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
        own = {place: made.weights.get(str(place), 0.0) for place in library}
        trained = dict(zip(made.expert, scratch, strict=True))
        for name, delta in made.expert.items():
            start = sum(share * open_expert(other)[name].dense() for other, share in own.items())
            torch.testing.assert_close(delta.dense(), start + trained[name].dense(), rtol=1e-4, atol=1e-6)


def test_an_adapted_expert_stands_alone(done, caplog):
    open_experts([done.expert.path])
    assert "will be missed" not in caplog.text


def test_the_same_seed_gives_the_same_expert(place, done):
    library = [place / "library/same", place / "library/other"]
    again = adapt(library, place / "new.jsonl", place / "again", steps=4, folds=2)
    assert open_expert(place / "again").content_hash == done.expert.content_hash == again.expert.content_hash


def test_each_row_is_left_out_once():
    folds = divided(10, 3, 1)
    assert sorted(row for left_out in folds for row in left_out) == list(range(10))
    assert sorted(map(len, folds)) == [3, 3, 4]
    assert folds == divided(10, 3, 1) != divided(10, 3, 2)


def test_bad_input_is_refused_in_one_sentence(place, tmp_path):
    library = [place / "library/same"]
    one = write_rows(tmp_path / "one.jsonl", [{"input": "a", "target": "b", "split": "train"}])
    held_out = Task(path=str(place / "new.jsonl"), role="held_out")
    for tasks, sentence in (
        (one, "has 1 labelled row outside of its test, and folds need 2"),
        (held_out, "kept for the test"),
    ):
        with pytest.raises(ValueError, match=sentence):
            adapt(library, tasks, tmp_path / "x")
    with pytest.raises(FileExistsError):
        adapt(library, one, place / "library/same")
    assert not (tmp_path / "x").exists()


def test_coefficients_of_neighbours_lower_the_loss_below_the_nearest_expert_s(place, done):
    library = [open_expert(place / "library" / name) for name in ("same", "other")]
    base = Base.open(None, library)
    rows = _Rows(TaskMixture(place / "new.jsonl"), library, base)
    model = base.load()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with tempfile.TemporaryDirectory() as scratch:
        weighted = _weighted(model, rows, range(len(rows)), library, Path(scratch, "sum"))
        with applied(model, weighted.sum):
            found, _ = rows.losses(model)
        for name, delta in weighted.sum.items():
            summed = sum(weighted.weights[str(own.place)] * own[name].dense() for own in library)
            torch.testing.assert_close(delta.dense(), summed, rtol=1e-4, atol=1e-6)
        with applied(model, library[0]):
            nearest, _ = rows.losses(model)
    assert found.sum() < nearest.sum()
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_the_lowest_loss_over_all_left_out_rows_names_the_number_of_steps():
    losses = {0: torch.tensor([2.0, 4.0, 1.0]), 8: torch.tensor([1.0, 1.0, 2.0]), 16: torch.tensor([0.0, 0.0, 5.0])}
    start = Start(torch.tensor([2.0, 1.0, 1.0]), losses)
    assert start.loss(0) == 7 / 4
    assert start.best_steps == 8


def test_training_that_only_harms_leaves_the_start_as_it_is(place, tmp_path):
    same = open_expert(place / "library/same")
    made = adapt([same], place / "new.jsonl", tmp_path / "made", LoRAExpert, TARGET, 4, 300.0, folds=2, neighbours=1)
    assert made.steps == 0
    ((_, weight),) = made.weights.items()
    for name, delta in made.expert.items():
        torch.testing.assert_close(delta.dense(), weight * same[name].dense(), rtol=1e-4, atol=1e-6)
    assert made.expert.record["parents"][0]["name"] == "same"


def test_where_nothing_helps_one_sentence_says_so_and_no_expert_is_written(place, tmp_path):
    """The one expert moves nothing, and the rate is so small that training moves nothing."""
    other = open_expert(place / "library/other")
    write_expert(tmp_path / "still", {name: delta * 0.0 for name, delta in other.items()}, other.record)
    with pytest.raises(ValueError, match="lowers the loss on left-out rows below the base's"):
        adapt([tmp_path / "still"], place / "new.jsonl", tmp_path / "made", LoRAExpert, TARGET, 4, 1e-30, folds=2)
    assert not (tmp_path / "made").exists()


def test_a_task_of_the_library_itself_is_told(place, tmp_path, caplog):
    copied = write_rows(
        tmp_path / "same.jsonl", [json.loads(line) for line in (place / "new.jsonl").read_text().splitlines()]
    )
    adapt([place / "library/same"], copied, tmp_path / "made", steps=2, folds=2)
    assert "library/same was trained on same itself" in caplog.text
    assert open_expert(tmp_path / "made").record["tasks"] == ["same"]


def test_the_command_tells_each_start_and_what_it_chose(place, tmp_path, capsys):
    run = ["adapt", str(place / "library/same"), str(place / "library/other"), "--tasks", str(place / "new.jsonl")]
    main([*run, "--out", str(tmp_path / "made"), "--steps", "4", "--folds", "2", "--expert", "LoRAExpert"])
    printed = capsys.readouterr().out
    assert "loss on 12 rows of new, each while it was left out" in printed
    for start_name in ("base", "neighbours"):
        assert re.search(rf"^ {start_name} +\d+\.\d{{4}}", printed, re.MULTILINE)
    chosen = open_expert(tmp_path / "made").record["hyperparameters"]["adapted"]
    assert f"chosen: {chosen['start']}, trained for {chosen['steps']} steps" in printed
    assert chosen["rows"] == 12
