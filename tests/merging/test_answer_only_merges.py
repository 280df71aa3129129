"""A merge of experts that act on answers alone is one, too, and stands where they do."""

from pathlib import Path

import pytest
import torch
from testbed import served

from modular_experts import Base, merge
from modular_experts.base.apply import applied
from modular_experts.injection.attach import attached
from modular_experts.library import StoredExpert, open_expert
from modular_experts.merging.merged import Merged

PROMPT = torch.tensor([[9, 10, 11, 12, 13]])


@pytest.fixture
def experts(tmp_path: Path, tiny_llama_dir: Path) -> list[StoredExpert]:
    forms = enumerate(("lora", "entries"))
    return [served.write(tiny_llama_dir, tmp_path / form, form, seed, on_answers=True) for seed, form in forms]


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
    with pytest.raises(ValueError, match="lora acts on answers alone and ordinary on prompts, too, so one model"):
        merge([experts[0], ordinary], "TaskArithmetic", tmp_path / "mixed")


def test_the_command_merges_them_and_refuses_what_it_cannot_measure(experts, run, tmp_path, tiny_llama_dir, task_files):
    places = [str(expert.path) for expert in experts]
    code, out, _ = run("merge", "--experts", *places, "--method", "TaskArithmetic", "--out", str(tmp_path / "both"))
    assert (code, "merged 2 experts with TaskArithmetic" in out) == (0, True)
    assert open_expert(tmp_path / "both").acts_on_answers
    for words in (["--output", "checkpoint"], ["--tune", "--tasks", str(task_files["upper"])]):
        code, _, err = run("merge", "--experts", *places, "--method", "TaskArithmetic", "--out", "other", *words)
        assert (code, "because it acts on answers alone" in err) == (1, True)
