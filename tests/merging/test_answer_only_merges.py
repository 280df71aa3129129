"""A merge of experts that act on answers alone is one, too, and stands where they do."""

from pathlib import Path

import pytest
import torch
from testbed import runs, served

from modular_experts import Base, merge
from modular_experts.base.apply import applied
from modular_experts.data import TaskMixture
from modular_experts.evaluation import batch_losses
from modular_experts.injection.attach import attached
from modular_experts.library import StoredExpert, open_expert
from modular_experts.merging.merged import Merged
from modular_experts.merging.objective import Objective, ValidationRows, objective_on_base
from modular_experts.merging.shrink import shrink
from modular_experts.merging.tune import tune
from modular_experts.methods import TaskArithmetic

PROMPT = torch.tensor([[9, 10, 11, 12, 13]])


@pytest.fixture
def experts(tmp_path: Path, tiny_llama_dir: Path) -> list[StoredExpert]:
    forms = {"upper": "lora", "reverse": "entries"}
    library = enumerate(forms.items())
    return [
        served.write(tiny_llama_dir, tmp_path / name, form, seed, on_answers=True) for seed, (name, form) in library
    ]


def test_a_merge_of_them_acts_on_answers_alone(experts, tmp_path, tiny_llama_dir) -> None:
    merged = merge(experts, "TaskArithmetic", tmp_path / "merged")
    assert (merged.acts_on_answers, merged.mergeable, merged.record["format"]) == (True, False, "modular-experts/5")
    model = Base.open(tiny_llama_dir).load()
    answers = []
    for several in ([merged], experts, [Merged(experts, "TaskArithmetic")]):
        with attached(model, several):
            answers.append(model.generate(PROMPT, max_new_tokens=12, do_sample=False, eos_token_id=-1).tolist())
    assert answers[0] == answers[1] == answers[2]
    with attached(model, experts[0]):
        assert model.generate(PROMPT, max_new_tokens=12, do_sample=False, eos_token_id=-1).tolist() != answers[0]


def test_it_is_never_added_to_the_weights(experts, tmp_path, tiny_llama_dir) -> None:
    model = Base.open(tiny_llama_dir).load()
    for several in (experts[0], Merged(experts, "TaskArithmetic")):
        with pytest.raises(ValueError, match="it acts on answers alone"):
            applied(model, several)
        with pytest.raises(ValueError, match="cannot be added to its base, because it acts on answers alone"):
            Base.open(tiny_llama_dir).write(several, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_experts_of_both_sorts_are_not_merged(experts, tmp_path, tiny_llama_dir) -> None:
    ordinary = served.write(tiny_llama_dir, tmp_path / "ordinary", "lora", 3)
    with pytest.raises(ValueError, match="upper acts on answers alone and ordinary on prompts, too, so one model"):
        merge([experts[0], ordinary], "TaskArithmetic", tmp_path / "mixed")


def losses_of(base: Path, expert: StoredExpert, data: TaskMixture) -> dict[str, float]:
    """Return the loss a target token of each task, by the stored expert where it stands for good."""
    model = Base.open(base).load()
    batches = Objective(model, data).batches
    with attached(model, expert), torch.no_grad():
        sums = {task: [batch_losses(model, batch) for batch in own] for task, own in batches.items()}
    return {task: float(sum(a.sum() for a, _ in own) / sum(b.sum() for _, b in own)) for task, own in sums.items()}


@pytest.mark.parametrize("labels", ["rows", "experts"])
def test_settings_are_chosen_by_what_the_merge_does_behind_the_base(
    labels, experts, tmp_path, tiny_llama_dir, task_files
):
    data = runs.mixture({name: task_files[name] for name in ("upper", "reverse")}, tiny_llama_dir)
    rows = ValidationRows(data, labels=labels, max_new_tokens=4)
    tuned = tune(experts, TaskArithmetic(), rows, tmp_path / "tuned", {"scale": [0.25, 1.0, 4.0]})
    assert tuned.expert.acts_on_answers
    assert len({round(trial.loss, 6) for trial in tuned.trials}) == 3
    if labels == "rows":
        assert losses_of(tiny_llama_dir, tuned.expert, data) == pytest.approx(tuned.best.losses, abs=1e-5)
    ordinary = served.write(tiny_llama_dir, tmp_path / "ordinary", "lora", 3)
    with pytest.raises(ValueError, match="on_answers=True of the objective is not how ordinary acts"):
        tune([ordinary], TaskArithmetic(), objective_on_base(experts, data))


def test_shrunk_ones_act_on_answers_alone_as_well(experts, tmp_path, tiny_llama_dir, task_files) -> None:
    data = runs.mixture({name: task_files[name] for name in ("upper", "reverse")}, tiny_llama_dir)
    for done in shrink(experts, data, tmp_path / "small", bound=0.05):
        assert done.expert.acts_on_answers
        assert done.chosen.bytes < done.before.bytes
        for expert, loss in ((done.source, done.before.loss), (done.expert, done.chosen.loss)):
            (task,) = expert.record["tasks"]
            assert losses_of(tiny_llama_dir, expert, data)[task] == pytest.approx(loss, abs=1e-5)


def test_the_command_merges_them_and_refuses_what_it_cannot_measure(experts, run, tmp_path, tiny_llama_dir, task_files):
    places = [str(expert.path) for expert in experts]
    code, out, _ = run("merge", "--experts", *places, "--method", "TaskArithmetic", "--out", str(tmp_path / "both"))
    assert (code, "merged 2 experts with TaskArithmetic" in out) == (0, True)
    assert open_expert(tmp_path / "both").acts_on_answers
    tasks = ["--tasks", str(task_files["upper"]), str(task_files["reverse"])]
    code, _, _ = run("shrink", *places, *tasks, "--out", str(tmp_path / "small"))
    assert (code, open_expert(tmp_path / "small" / "upper").acts_on_answers) == (0, True)
    code, _, err = run("merge", "--experts", *places, "--method", "RegMean", "--out", str(tmp_path / "other"))
    assert (code, "needs gram statistics, and no command takes them of" in err) == (1, True)
    code, out, _ = run("show", places[0])
    assert "with experts that act on answers alone, and not into the base's weights" in " ".join(out.split())
    words = ["--method", "TaskArithmetic", "--output", "checkpoint", "--out", str(tmp_path / "other")]
    code, _, err = run("merge", "--experts", *places, *words)
    assert (code, "upper cannot be added to its base, because it acts on answers alone" in err) == (1, True)
