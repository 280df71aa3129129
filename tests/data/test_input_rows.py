"""From `fit --keep_inputs` to statistics, a router, a search and smaller experts, all without task files."""

import json
import shutil

import pytest
import torch
from testbed.runs import TARGET

from modular_experts import fit, open_expert
from modular_experts.base import Base
from modular_experts.data import Inputs
from modular_experts.data.batch import prompts_of
from modular_experts.experts import SparseExpert
from modular_experts.library import open_statistics
from modular_experts.library.kept_inputs import INPUTS_FILE
from modular_experts.merging.objective import ValidationRows, objective_on_base

EXPERTS = ["--experts", "library/a", "library/b"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, one_block, task_files):
    """A library of experts of the tasks `a` and `b`, which keep at most ten inputs each."""
    place = tmp_path_factory.mktemp("inputs")
    for name, task in (("a", "upper"), ("b", "reverse")):
        tasks = [{"name": name, "path": str(task_files[task])}]
        how = {"steps": 20, "learning_rate": 0.3, "keep_inputs": 10, "trainer": {"logger": False}}
        fit(one_block, tasks, SparseExpert, TARGET, place / "library" / name, **how)
    return place / "library"


@pytest.fixture
def library(trained, tmp_path, monkeypatch):
    """The library alone, in the current directory."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(trained, tmp_path / "library")


def trained_inputs(file) -> list[str]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [row["input"] for row in rows if row["split"] == "train"]


def test_prompts_of_training_rows_are_kept_and_nothing_else(library, one_block, task_files, run) -> None:
    tokenizer = Base.open(one_block).tokenizer()
    for name, task in (("a", "upper"), ("b", "reverse")):
        kept = open_expert(library / name).inputs()
        assert list(kept) == [name]
        texts = [tokenizer.decode(one.ids) for one in kept[name]]
        trained = trained_inputs(task_files[task])
        assert texts == [text for number, text in enumerate(trained) if number in {n * 12 // 10 for n in range(10)}]
        assert {one.end for one in kept[name]} == {tokenizer.eos_token_id}
    assert "10 kept, as token ids" in run("show", "library/a")[1]


def test_each_tasks_own_expert_answers_what_it_keeps(library) -> None:
    experts = [open_expert(library / name) for name in "ab"]
    objective = objective_on_base(experts, ValidationRows(rows=6, max_new_tokens=3))
    assert objective.origin["labels"] == "experts"
    for expert in experts:
        asked = [ids for batch in objective.batches[expert.name] for ids in prompts_of(batch)]
        kept = {tuple(one.ids.tolist()) for one in expert.inputs()[expert.name]}
        assert len(asked) == 6
        assert {tuple(ids.tolist()) for ids in asked} < kept
        with torch.no_grad():
            own = objective.losses_with(expert, tasks=[expert.name])[expert.name]
            other = objective.losses_with(next(one for one in experts if one is not expert), tasks=[expert.name])
        assert own < other[expert.name] - 0.1


@pytest.mark.parametrize(
    "command",
    [
        ["statistics", *EXPERTS, "--kind", "gram", "--max_new_tokens", 2],
        ["route", *EXPERTS, "--out", "library/routed"],
        ["search", *EXPERTS, "--algorithm", "ATLAS", "--algorithm.steps", 2, "--out", "library/ab"],
        ["merge", *EXPERTS, "--method", "Average", "--tune.rows", 4, "--out", "library/ab"],
        ["shrink", *EXPERTS, "--bound", 9, "--out", "small"],
    ],
)
def test_the_library_alone_is_enough(run, library, command) -> None:
    assert run(*command)[::2] == (0, "")
    if command[0] == "statistics":
        facts = open_statistics(open_expert("library/a"), "gram").facts
        assert facts["tasks"] == {"a": 10}
        assert (facts["data"]["split"], facts["data"]["labels"]) == ("kept inputs", "experts")


def test_what_needs_more_than_the_kept_inputs_is_refused(library, one_block, run) -> None:
    experts = [open_expert(library / name) for name in "ab"]
    data = Inputs.kept_by(experts)
    data.tokenizer = str(one_block)
    with pytest.raises(ValueError, match="this task has inputs alone, and its targets are needed"):
        data.validation_examples()
    data.tokenizer = Base.open(one_block).tokenizer()
    data.prompts["a"][0].ids[0] = 10**6
    with pytest.raises(ValueError, match="the inputs of a hold the token 1000000, which the tokenizer lacks"):
        data.input_examples(["validation"])
    (library / "b" / INPUTS_FILE).unlink()
    code, _, err = run("search", *EXPERTS, "--algorithm", "ATLAS", "--out", "library/ab")
    assert (code, err.count("\n")) == (1, 1)
    assert "no rows are given, and 1 of 2 experts keep no inputs, such as" in err
    assert "train with fit --keep_inputs 256" in err


def test_long_inputs_keep_their_last_tokens(library, one_block) -> None:
    data = Inputs(open_expert(library / "a").inputs(), tokenizer=str(one_block), max_length=5)
    whole = open_expert(library / "a").inputs()["a"]
    found = data.input_examples(["validation"])["a"]
    assert [one.tokens.ids.tolist() for one in found] == [one.ids[-5:].tolist() for one in whole]
    assert [one.tokens.prompt for one in found] == [5] * 10


def test_keeping_needs_a_place_and_data_that_have_inputs_and_says_so(run, one_block, two_task_files) -> None:
    how = ["--expert", "SparseExpert", "--modules", TARGET, "--steps", 1, "--tasks", "a.jsonl", "--keep_inputs", 5]
    code, _, err = run("fit", "--base", one_block, *how)
    assert (code, "keep_inputs keeps inputs beside an expert" in err) == (1, True)
    how[-1:] = [-1, "--out", "library/a"]
    assert "keep_inputs=-1 must be 0 or more inputs" in run("fit", "--base", one_block, *how)[2]
    how[-3] = 5
    said = run("fit", "--base", one_block, *how)[2]
    assert "kept 5 inputs of a beside it, which its tokenizer turns back into text; push leaves them out" in said


def test_the_two_parts_share_no_input(library) -> None:
    data = Inputs.kept_by([open_expert(library / "a")])
    held, others = (data.part(held).prompts["a"] for held in (True, False))
    ids = [[tuple(one.ids.tolist()) for one in part] for part in (held, others)]
    assert (len(held), len(others)) == (2, 8)
    assert not {*ids[0]} & {*ids[1]}
    with pytest.raises(ValueError, match="a has 2 inputs; a fourth needs at least 4"):
        Inputs({"a": held}, tokenizer=data.tokenizer).part(True)
