"""`distill_into`: one expert learns what many experts predict at each token of their answers."""

import shutil

import pytest
import torch
from conftest import write_rows

from modular_experts import Base, LoRAExpert, applied, distill_into, fit
from modular_experts.base.files import fingerprint
from modular_experts.data import Inputs
from modular_experts.data.batch import IGNORED
from modular_experts.library import open_experts
from modular_experts.merging.distill import VALIDATED, _Answers, _Taught
from modular_experts.merging.objective import batch_divergences, own_experts

TASKS = ("first", "second")
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
HOW = {"modules": "all-linear", "max_new_tokens": 3, "trainer": QUIET}


@pytest.fixture(scope="module")
def library(one_block, tmp_path_factory):
    """Experts of two tasks with other answers, which keep the inputs of their training rows."""
    place = tmp_path_factory.mktemp("distill") / "library"
    for name, answers in (("first", "ab"), ("second", "zy")):
        words = [f"{name[0]}{number:03d}{'pq'[number % 2]}" for number in range(40)]
        rows = [{"input": f"word {word}", "target": answers["pq".index(word[-1])], "split": "train"} for word in words]
        file = write_rows(place.parent / f"{name}.jsonl", rows)
        how = {"steps": 60, "learning_rate": 0.03, "keep_inputs": 99}
        fit(one_block, file, LoRAExpert, "all-linear", place / name, **how, trainer=QUIET | {"limit_val_batches": 0})
    return place


@pytest.fixture
def experts(library):
    return [library / name for name in TASKS]


@pytest.fixture
def taught(experts, one_block):
    opened = open_experts(experts)
    inputs = Inputs.kept_by(opened)
    base = Base.open(one_block)
    inputs.take_tokenizer(base)
    answers = _Answers(base.load(), own_experts(opened, list(TASKS)), inputs, 3, iter)
    return _Taught(inputs, answers, None)


def divergence(teachers, student, batch) -> float:
    """Return KL(teacher || student) summed over the labelled places of a padded batch, in float64."""
    total = 0.0
    for row, task in enumerate(batch["task"]):
        ids = batch["input_ids"][row][None]
        places = (batch["labels"][row, 1:] != IGNORED).nonzero()[:, 0]
        theirs, own = (
            model(input_ids=ids).logits[0, places].double().softmax(-1) for model in (teachers[task], student)
        )
        total += float((theirs * (theirs.log() - own.log())).sum())
    return total


@pytest.mark.parametrize("packed", [False, True])
def test_the_loss_of_a_batch_is_the_divergence_from_each_row_s_own_expert(taught, experts, one_block, packed):
    rows = [row for part in taught.examples("train").values() for row in part][::3]
    teachers = {task: Base.open(one_block).load() for task in TASKS}
    student = Base.open(one_block).load()
    padded = taught._training_batch(rows)
    taught.packed = packed
    batch = taught._training_batch(rows)
    assert ("row" in batch) == packed
    with torch.no_grad(), applied(teachers["first"], experts[0]), applied(teachers["second"], experts[1]):
        sums, counts = batch_divergences(student, batch)
        expected = divergence(teachers, student, padded)
    assert expected > 0.1
    assert float(sums.sum()) == pytest.approx(expected, rel=1e-4)
    assert int(counts.sum()) == int((padded["labels"][:, 1:] != IGNORED).sum())


def test_every_sixteenth_row_validates_and_is_not_learned(taught):
    for task, rows in taught.answers.items():
        learned, validated = (taught.examples(split)[task] for split in ("train", "validation"))
        assert validated == rows[1::VALIDATED]
        assert len(learned) + len(validated) == len(rows) == 40
        assert not {*learned} & {*validated}


def test_one_expert_predicts_what_both_do_on_rows_that_it_did_not_learn(taught, experts, one_block, tmp_path):
    made = distill_into(experts, tmp_path / "one", LoRAExpert, steps=60, learning_rate=0.03, keep_inputs=6, **HOW)
    model = Base.open(one_block).load()
    batch = taught._training_batch([row for rows in taught.examples("validation").values() for row in rows])
    with torch.no_grad():
        before = batch_divergences(model, batch)[0].sum()
        with applied(model, made):
            after = batch_divergences(model, batch)[0].sum()
    assert after < 0.02 * before
    assert made.record["tasks"] == sorted(TASKS)
    assert {task: len(prompts) for task, prompts in made.inputs().items()} == dict.fromkeys(TASKS, 3)
    assert [parent["name"] for parent in made.record["parents"]] == list(TASKS)
    assert made.record["base"]["fingerprint"] == fingerprint(one_block)
    assert made.record["hyperparameters"]["distilled"] == dict.fromkeys(TASKS, 40)


def test_the_same_seed_gives_the_same_expert(experts, tmp_path):
    how = HOW | {"steps": 4, "learning_rate": 0.02}
    one, two = (distill_into(experts, tmp_path / name, LoRAExpert, **how) for name in ("one", "two"))
    other = distill_into(experts, tmp_path / "other", LoRAExpert, seed=1, **how)
    assert one.content_hash == two.content_hash != other.content_hash


def test_a_distilled_expert_needs_no_parents(experts, tmp_path, caplog):
    distill_into(experts, tmp_path / "one", LoRAExpert, steps=1, **HOW)
    open_experts([tmp_path / "one"])
    assert "will be missed" not in caplog.text


def test_bad_input_is_refused_in_one_sentence(experts, tmp_path):
    other = write_rows(tmp_path / "other.jsonl", [{"input": "a", "split": "train"}])
    for words, sentence in (({"rows": 0}, "must be at least 1"), ({"tasks": other}, "no record names the task")):
        with pytest.raises(ValueError, match=sentence):
            distill_into(experts, tmp_path / "one", LoRAExpert, **HOW, **words)
    shutil.copytree(experts[0], tmp_path / "bare")
    (tmp_path / "bare/inputs.safetensors").unlink()
    with pytest.raises(ValueError, match="1 of 2 experts keep no inputs"):
        distill_into([tmp_path / "bare", experts[1]], tmp_path / "one", LoRAExpert, **HOW)
    with pytest.raises(FileExistsError):
        distill_into(experts, experts[0], LoRAExpert, **HOW)


def test_the_command(run, experts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    how = ["--into", "LoRAExpert", "--steps", 2, "--max_new_tokens", 3, "--out", "library/one"]
    code, printed, said = run("distill", *experts, *how)
    assert code == 0, said
    assert "library/one: LoRAExpert" in printed
