"""Train, resume, measure and apply experts of a base that is quantised while it is loaded."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from testbed import runs
from testbed.quantised import load, plain_twin, put, step
from transformers import AutoModelForCausalLM

from modular_experts import ExpertModule, TaskMixture, apply, estimate_fit, fit
from modular_experts.base import Base
from modular_experts.base.apply import apply_deltas
from modular_experts.base.quantised import quantiser
from modular_experts.evaluation import batch_losses, evaluate
from modular_experts.experts import LoRAExpert, SparseExpert
from modular_experts.injection.answer_only import AnswerOnly
from modular_experts.training.loading import put_applied
from modular_experts.training.train_under_others import TrainUnderOthers

pytest.importorskip("bitsandbytes")

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
HOW = {"modules": "all-linear", "steps": 6, "batch_size": 4, "trainer": QUIET, "learning_rate": 0.03}
SPARSE = partial(SparseExpert, keep_ratio=0.1)


@pytest.fixture(scope="module")
def wide(tiny) -> str:
    """A base whose rows are whole blocks of 64, as bitsandbytes 0.50 needs them on a CPU."""
    return str(tiny("llama", hidden_size=64, intermediate_size=128))


@pytest.fixture(scope="module")
def sparse(tmp_path_factory, wide, task_files):
    """A sparse expert that was trained on the base in nf4."""
    out = tmp_path_factory.mktemp("library") / "a"
    return fit(wide, [str(task_files["upper"])], SPARSE, out=out, quantise="nf4", **HOW)


@pytest.fixture
def tasks(tmp_path, monkeypatch, task_files) -> list[str]:
    monkeypatch.chdir(tmp_path)
    return [str(task_files["upper"])]


def losses(found, tasks, base) -> dict[str, float]:
    """Return the loss of the base alone and with an expert, as `evaluate` measures them."""
    results = evaluate(base, {"base": [], "expert": found}, TaskMixture(tasks, eval_batch_size=6), max_new_tokens=None)
    return {row["model"]: row["value"] for row in results.where(metric="loss").rows}


@pytest.mark.parametrize("kind", ["sparse", "lora"])
def test_an_expert_of_a_quantised_base_is_one_of_the_base(kind, sparse, tasks, wide) -> None:
    lora = partial(LoRAExpert, rank=4)
    found = sparse if kind == "sparse" else fit(wide, tasks, lora, out="library/b", quantise="nf4", **HOW)
    plain = Base.open(wide)
    assert found.record["base"]["fingerprint"] == plain.fingerprint
    quantised = found.record["training"]["quantised"]
    assert quantised["form"] == "nf4"
    assert quantised["settings"]["bnb_4bit_use_double_quant"] is True
    apply([found], "both", wide)
    model, whole = plain.load(), AutoModelForCausalLM.from_pretrained("both")
    name = next(iter(found))
    moved = whole.get_parameter(name) - model.get_parameter(name)
    assert torch.allclose(moved, found[name].dense(), atol=1e-6)


def test_it_is_measured_on_both_bases(sparse, tasks, wide) -> None:
    plain, quantised = (losses(sparse, tasks, Base.open(wide, quantise=form)) for form in (None, "nf4"))
    assert quantised["base"] != plain["base"]
    assert quantised["expert"] < quantised["base"] - 0.05
    assert plain["expert"] < plain["base"] - 0.05
    # A test of the module adds the stored delta too.
    module = ExpertModule(wide, applied=[str(sparse.path)], quantise="nf4")
    data = TaskMixture(tasks, wide, eval_batch_size=6)
    runs.trainer("x").test(module, data, verbose=False)
    assert module.results["tasks"]["upper"]["loss"] == pytest.approx(quantised["expert"], abs=1e-6)


def test_a_resumed_run_ends_with_the_same_expert(sparse, tasks, wide) -> None:
    # The schedule of the rate counts all steps, so the first part stops by itself.
    stopping = HOW | {"trainer": QUIET | {"callbacks": [Stop(3)]}}
    fit(wide, tasks, SPARSE, out="library/part", quantise="nf4", **stopping)
    how = HOW | {"checkpoint": "part.ckpt"}
    resumed = fit(wide, tasks, SPARSE, out="library/resumed", quantise="nf4", **how)
    assert all(torch.equal(resumed[name].dense(), sparse[name].dense()) for name in sparse)
    with pytest.raises(ValueError, match="was trained with quantise=nf4, and quantise=None is set now"):
        fit(wide, tasks, SPARSE, out="library/other", **how)


class Stop(Callback):
    """Stops a run after some steps, and leaves a checkpoint."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer, pl_module, *rest) -> None:
        if trainer.global_step == self.steps:
            trainer.save_checkpoint("part.ckpt")
            trainer.should_stop = True


def test_an_expert_is_trained_on_top_of_another(sparse, tasks, wide) -> None:
    on_top = {"quantise": "nf4", "model": {"applied": [str(sparse.path)]}}
    top = fit(wide, tasks, LoRAExpert, out="library/b", **HOW | on_top)
    assert [parent["name"] for parent in top.record["parents"]] == ["a"]
    model = load(wide)
    twin = plain_twin(model)
    put_applied(model, [sparse], trains=True)
    apply_deltas(twin, [sparse])
    (loss, found), (expected_loss, expected) = (step(put(one, LoRAExpert)) for one in (model, twin))
    assert loss == pytest.approx(expected_loss, abs=1e-6)
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)


@pytest.mark.parametrize("kind", [SPARSE, partial(LoRAExpert, rank=4)])
def test_experts_that_act_on_answers_alone_are_trained(kind, tasks, wide) -> None:
    model = load(wide)
    batch = next(iter(runs.mixture({"upper": Path(tasks[0])}, wide).train_dataloader()))
    found = {}
    for name, one in {"quantised": model, "plain": plain_twin(model)}.items():
        AnswerOnly(put(one, kind))
        each, _ = batch_losses(one, batch)
        each.sum().backward()
        gradients = {name: weight.grad for name, weight in one.named_parameters() if weight.requires_grad}
        found[name] = each, gradients
    torch.testing.assert_close(found["quantised"], found["plain"], rtol=0, atol=1e-5)
    assert max(gradient.abs().max() for gradient in found["plain"][1].values()) > 1e-3
    expert = fit(wide, tasks, kind, out="library/answers", quantise="nf4", model={"acts_on": "answer"}, **HOW)
    scores = losses(expert, tasks, Base.open(wide, quantise="nf4"))
    assert scores["expert"] < scores["base"] - 0.05


def test_a_base_that_is_stored_or_given_quantised_trains_alike_and_is_not_applied_to(sparse, tasks, wide) -> None:
    settings = quantiser("nf4", torch.float32)
    model, other = (
        AutoModelForCausalLM.from_pretrained(wide, dtype="float32", quantization_config=settings) for _ in range(2)
    )
    model.save_pretrained("stored")
    Base.open(wide).tokenizer().save_pretrained("stored")
    found = fit("stored", tasks, SPARSE, out="library/stored", **HOW)
    assert all(torch.allclose(found[name].dense(), sparse[name].dense(), atol=1e-6) for name in sparse)
    assert found.record["training"]["quantised"]["bnb_4bit_quant_type"] == "nf4"
    assert found.record["base"]["fingerprint"] == Base.open("stored").fingerprint
    with pytest.raises(ValueError, match="are quantised, and deltas cannot be added to them exactly"):
        apply([found], "both", "stored")
    with pytest.raises(ValueError, match="are quantised already; leave out nf4"):
        fit("stored", tasks, SPARSE, out="library/twice", quantise="nf4", **HOW)
    given = fit(model, tasks, SPARSE, out="library/given", **HOW)
    assert all(torch.equal(given[name].dense(), sparse[name].dense()) for name in sparse)
    packed = other.model.layers[0].self_attn.q_proj.weight.data
    packed.copy_(packed.flip(0))
    with pytest.raises(ValueError, match=r"q_proj.weight of the model is not that .* its base"):
        fit(other, tasks, SPARSE, out="library/other", **HOW)


def test_others_are_not_written_into_a_quantised_weight(sparse, tasks, wide) -> None:
    others = {"trainer": QUIET | {"callbacks": [TrainUnderOthers([str(sparse.path)], count=1)]}}
    reverse = [task.replace("upper", "reverse") for task in tasks]
    with pytest.raises(ValueError, match="the others cannot be written into it"):
        fit(wide, reverse, SPARSE, out="library/b", quantise="nf4", **HOW | others)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"quantise": "int8-dynamic"}, "it also rounds the activations, and has no gradient; take one of nf4"),
        ({"quantise": "nf3"}, "quantise='nf3' is not supported: take one of nf4"),
        ({"quantise": "nf4", "model": {"dtype": "float64"}}, "does not compute in float64"),
    ],
)
def test_a_form_that_cannot_train_is_refused(settings, sentence, tasks, wide) -> None:
    with pytest.raises(ValueError, match=sentence):
        fit(wide, tasks, SPARSE, out="library/a", **HOW | settings)


def test_a_missing_library_is_named_with_its_extra(tasks, wide, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"needs bitsandbytes.*modular-experts\[quantised\]"):
        fit(wide, tasks, SPARSE, out="library/a", quantise="nf4", **HOW)


def test_an_estimate_counts_the_quantised_bytes(tasks, wide) -> None:
    plain, quantised = (
        estimate_fit(wide, tasks, SPARSE, out="library/a", **HOW | form) for form in ({}, {"quantise": "nf4"})
    )
    assert quantised.bytes["base"] < plain.bytes["base"] / 2
    assert [one.entries for one in quantised.weights] == [one.entries for one in plain.weights]


def test_the_commands_take_the_form(tasks, wide, run) -> None:
    how = ["--base", wide, "--tasks", *tasks, "--quantise", "nf4"]
    fit_options = ["--expert", "SparseExpert", "--modules", "q_proj", "--steps", "2", "--out", "library/a"]
    assert run("fit", *how, *fit_options)[0] == 0
    record = json.loads(Path("library/a/expert.json").read_text())
    assert record["training"]["quantised"]["form"] == "nf4"
    code, _, errors = run("evaluate", *how, "--experts", "library/a", "--max_new_tokens", "2", "--out", "runs/nf4")
    assert code == 0, errors
    assert json.loads(Path("runs/nf4/results.json").read_text())["facts"]["dtype"] == "float32, nf4"
