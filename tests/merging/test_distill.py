"""`Distilled` is a search by row from the experts' answers, in one word, with kept inputs or with task files."""

import json
import shutil

import pytest
import torch
from conftest import build_model
from testbed.runs import mixture
from testbed.searching import descent, objective_on

from modular_experts import Average, Base, Distilled, IsoC, SelfRegMean, applied, distill, merge, open_expert, search
from modular_experts.base.files import fingerprint
from modular_experts.data import Inputs, TaskMixture
from modular_experts.deltas import Dense
from modular_experts.deltas.algebra import truncated_svd
from modular_experts.library import make_record, write_expert
from modular_experts.merging.distill import _runner, without_data
from modular_experts.merging.gradient_search import ATLAS
from modular_experts.merging.objective import MEASURES, ValidationRows, objective_on_base
from modular_experts.text import block_of

TASKS = ("upper", "reverse")
EXPERTS = ["library/upper", "library/reverse"]
FEW = {"steps": 4, "batch": 3, "rows": 12, "max_new_tokens": 3}
OPTIONS = [word for name, value in FEW.items() for word in (f"--method.{name}", value)]


@pytest.fixture
def place(tiny_llama_dir, task_files, tmp_path, monkeypatch):
    """A directory to stand in, with an expert for each of two tasks, which keeps the inputs of its training rows."""
    monkeypatch.chdir(tmp_path)
    objective = objective_on(tiny_llama_dir, task_files)
    data = mixture({name: task_files[name] for name in TASKS}, tiny_llama_dir)
    prompts = Inputs.read_from(data, ["train"], 99).prompts
    base = {"id": str(tiny_llama_dir), "revision": None, "fingerprint": fingerprint(tiny_llama_dir)}
    for name in TASKS:
        record = make_record("SparseExpert", base, tasks=[name])
        deltas = descent(objective, name, 3.0)
        write_expert(tmp_path / "library" / name, deltas, record, inputs={name: prompts[name]})
    return tmp_path


def test_it_is_the_search_by_row_from_the_experts_answers(done, place) -> None:
    out = done("merge", *EXPERTS, "--method", "Distilled", *OPTIONS, "--out", "library/both")
    assert "merged 2 experts with Distilled(" in out
    merged = open_expert("library/both")
    data = Inputs.kept_by([open_expert(one) for one in EXPERTS])
    data.eval_batch_size = 3
    algorithm = ATLAS(4, 0.02, objective="distill", per="row", decay=True)
    rows = ValidationRows(data, 12, labels="experts", max_new_tokens=3)
    found = search(EXPERTS, algorithm, rows, "library/again", [SelfRegMean(flatten=0.5)])
    assert merged.content_hash == found.expert.content_hash
    assert merged.record["hyperparameters"]["labels"] == "experts"
    data.eval_batch_size = 5
    assert distill(EXPERTS, "library/python", Distilled(**FEW), data).expert.content_hash == merged.content_hash
    assert data.eval_batch_size == 5, "the caller's inputs stay as they were"
    shutil.copytree("library/both", "library/other-SelfRegMean")
    with pytest.raises(FileExistsError, match="other-SelfRegMean exists already"):  # before any row is read
        distill(EXPERTS, "library/other", data=TaskMixture("missing.jsonl"))


def test_task_files_give_training_and_validation_inputs(run, place, task_files) -> None:
    for name in TASKS:
        (place / "library" / name / "inputs.safetensors").unlink()
        rows = [json.loads(line) for line in task_files[name].read_text().splitlines()]
        inputs = [json.dumps({"input": row["input"], "split": row["split"]}) for row in rows if row["split"] != "test"]
        (place / f"{name}.jsonl").write_text("\n".join(inputs))
    how = ["--method", "Distilled", *OPTIONS, "--tasks", "upper.jsonl", "reverse.jsonl"]
    assert run("merge", *EXPERTS, *how, "--out", "library/inputs")[::2] == (0, "")
    data = mixture({name: task_files[name] for name in TASKS}, open_expert(EXPERTS[0]).record["base"]["id"])
    data.max_length = 1024
    same = distill(EXPERTS, "library/rows", Distilled(**FEW), data)
    assert open_expert("library/inputs").content_hash == same.expert.content_hash


def test_each_mistake_gets_one_sentence(run, place) -> None:
    with pytest.raises(ValueError, match="no formula of the deltas gives a merge by Distilled; `distill`"):
        merge(EXPERTS, "Distilled", "library/both")
    (place / "library/upper/inputs.safetensors").unlink()
    ours = ["merge", *EXPERTS, "--out", "library/both", "--method"]
    for words, sentence in [
        (["Distilled"], "no rows are given, and 1 of 2 experts keep no inputs"),
        (["Distilled", "--dry-run"], "Distilled searches, and writes an expert; give out, base"),
        (["Distilled", "--output", "checkpoint"], "give out, base, overwrite, skip and data alone"),
        (["Average", "--tasks", "a.jsonl"], "such as Distilled; add --tune"),
        (["Distilled", "--method.steps", "0"], "steps must be at least 1, got 0"),
    ]:
        code, _, err = run(*ours, *words)
        assert (code, err.count("\n"), sentence in err) == (1, 1, True), err


def test_loras_start_from_a_merge_for_loras(place) -> None:
    upper = open_expert(EXPERTS[0])
    low = {name: truncated_svd(delta, 2)[0] for name, delta in upper.items() if len(delta.shape) == 2}
    write_expert("library/low", low, upper.record)
    assert without_data([open_expert("library/low")]) == IsoC()
    assert without_data([open_expert("library/low"), upper]) == SelfRegMean(flatten=0.5)


WINDOWS = {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 2}
WINDOWS |= {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "neox", "phi3", "qwen2"])
def test_blocks_alone_pass_states_as_the_model_does(architecture) -> None:
    model = build_model(architecture, **WINDOWS if architecture == "qwen2" else {})
    names = {block_of(name) for name, _ in model.named_parameters()} - {None}
    parent = min(names).rpartition(".")[0]
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    batch = {"input_ids": torch.arange(10).view(2, 5) + 3, "attention_mask": mask}
    whole = model(**batch, output_hidden_states=True, use_cache=False).hidden_states
    states = None
    for number in range(len(names)):
        entered, states = _runner(model, parent, number)(batch, states)
        torch.testing.assert_close(entered[mask == 1], whole[number][mask == 1])
    assert len(model.get_submodule(parent)) == len(names)


def test_block_after_block_comes_nearer_to_the_experts_states(place) -> None:
    settings = FEW | {"steps": 20, "learning_rate": 0.2}
    experts = [open_expert(one) for one in EXPERTS]
    start = merge(EXPERTS, without_data(experts), "library/start")
    done = distill(EXPERTS, "library/block", Distilled(**settings, by="block"))
    assert {trial.settings["block"] for trial in done.found.trials} == {0, 1}
    assert done.expert.keys() == start.keys()
    data = Inputs.kept_by(experts)
    objective = objective_on_base(experts, ValidationRows(data, 12, labels="experts", max_new_tokens=3), distills=True)
    distance = {}
    for expert in (start, done.expert):
        with applied(objective.model, expert, check=False):
            distance[expert.name] = sum(objective.losses(MEASURES["distill"]).values())
    assert distance["block"] < 0.8 * distance["start"]
    rows = sum(shape[0] for shape in done.expert.shapes().values())
    assert done.found.coefficients.shape == (rows, 3)
    assert done.expert.record["hyperparameters"]["by"] == "block"


def test_experts_outside_of_blocks_cannot_be_compared_block_by_block(place) -> None:
    head = open_expert(EXPERTS[0])
    weight = torch.randn(Base.open(None, [head]).load().lm_head.weight.shape)
    write_expert("library/head", {"lm_head.weight": Dense(weight)}, head.record, inputs=head.inputs())
    with pytest.raises(ValueError, match="by=block needs experts that move weights of transformer blocks"):
        distill(["library/head"], "library/one", Distilled(**FEW, start=Average(), by="block"))


def test_a_merge_of_one_expert_keeps_it(place) -> None:
    """All states are the expert's own from the start, so no coefficient has a gradient."""
    found = distill(EXPERTS[:1], "library/one", Distilled(**FEW, start=Average(), by="block"))
    own = open_expert(EXPERTS[0])
    assert all(torch.allclose(found.expert[name].dense(), own[name].dense(), atol=1e-6) for name in own)
