"""`fit` on top of a routed expert: it stays as it is, and the new expert is used with it."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from testbed import runs

from modular_experts.__main__ import main
from modular_experts.base import Base
from modular_experts.base.files import fingerprint
from modular_experts.data import TaskMixture
from modular_experts.deltas import Dense
from modular_experts.evaluation import evaluate
from modular_experts.experts import FullExpert, LoRAExpert, SparseExpert
from modular_experts.injection.attach import attached
from modular_experts.library import as_parents, make_record, open_expert, write_expert
from modular_experts.merging.route import route
from modular_experts.merging.statistics import take_statistics
from modular_experts.routing import Centroid, Constant, Energy, Softmax
from modular_experts.systems.molora import MoLoRAExpert
from modular_experts.training.export_expert import ExportExpert

KINDS = [partial(LoRAExpert, rank=2), partial(SparseExpert, keep_ratio=0.1), FullExpert]
WEIGHTS = {"model.layers.0.self_attn.q_proj.weight": (32, 32), "model.layers.1.mlp.up_proj.weight": (48, 32)}
IDS = torch.tensor([[7, 8, 9, 10, 11, 12], [20, 21, 22, 5, 4, 3]])


@pytest.fixture
def experts(tiny_llama_dir, task_files, tmp_path) -> list[str]:
    """Directories of three experts with the vectors of their prompts."""
    base = {"id": str(tiny_llama_dir), "revision": None, "fingerprint": fingerprint(tiny_llama_dir)}
    for seed, task in enumerate(task_files):
        made = torch.Generator().manual_seed(seed)
        deltas = {name: Dense(0.1 * torch.randn(shape, generator=made)) for name, shape in WEIGHTS.items()}
        write_expert(tmp_path / "library" / task, deltas, make_record("made", base, tasks=[task]))
    found = [str(tmp_path / "library" / task) for task in task_files]
    data = TaskMixture([{"name": task, "path": str(file)} for task, file in task_files.items()])
    take_statistics(found, "prompts", data)
    return found


def logits(model: torch.nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits


@pytest.mark.parametrize(
    ("kind", "router"),
    [*zip(KINDS, [Centroid(reject=None, select=Softmax(5.0)), Energy()] * 2, strict=False)],
    ids=["lora-prompts", "sparse-tokens", "full-prompts"],
)
def test_a_new_expert_starts_at_the_routed_one_and_is_used_with_it(
    kind, router, experts, tiny_llama_dir, task_files, tmp_path
) -> None:
    below = route(experts, Path(experts[0]).parent / "r", router)
    before = {file.name: file.read_bytes() for file in below.path.iterdir() if file.is_file()}
    module = runs.module(tiny_llama_dir, kind, applied=[str(below.path)], learning_rate=3e-2)
    module.configure_model()
    base = Base.open(tiny_llama_dir).load()
    with attached(base, below):
        torch.testing.assert_close(logits(module.model), logits(base), rtol=1e-5, atol=1e-5)
    assert not any("beneath" in name for name in module.state_dict()), "a checkpoint holds what is trained alone"
    export = ExportExpert(str(below.path.parent), "top", monitor=None)
    runs.trainer(tmp_path, export, max_steps=4).fit(module, runs.mixture(task_files, tiny_llama_dir))
    top = open_expert(export.target)
    assert [parent["name"] for parent in top.record["parents"]] == ["r"]
    start = {name: weight.clone() for name, weight in base.state_dict().items()}
    with attached(base, [below, top]):
        found = logits(base)
    torch.testing.assert_close(found, logits(module.model), rtol=1e-4, atol=1e-4)
    with attached(base, top):
        assert (logits(base) - found).abs().max() > 1e-3, "the routed expert must be beneath it"
    with attached(base, below):
        assert (logits(base) - found).abs().max() > 1e-3
    assert all(torch.equal(weight, start[name]) for name, weight in base.state_dict().items())
    assert not base._forward_pre_hooks
    assert before == {file.name: file.read_bytes() for file in below.path.iterdir() if file.is_file()}


def test_the_commands_train_on_top_of_a_routed_expert(
    experts, tiny_llama_dir, task_files, tmp_path, monkeypatch, caplog
) -> None:
    monkeypatch.chdir(tmp_path)
    route(experts, Path(experts[0]).parent / "r", Centroid())
    tasks = ["--tasks", str(task_files["upper"])]
    how = ["--base", str(tiny_llama_dir), *tasks, "--trainer.logger", "false", "--trainer.accelerator", "cpu"]
    new = ["--expert", "LoRAExpert", "--modules", "v_proj", "--steps", "2"]
    assert main(["fit", *how, *new, "--applied", "library/r", "--out", "library/top"]) == 0
    both = ["--experts", "library/r", "library/top"]
    assert main(["test", *how, *both]) == 0
    results = max(tmp_path.rglob("results.json"), key=lambda file: file.stat().st_mtime_ns)
    data = runs.mixture({"upper": task_files["upper"]}, tiny_llama_dir)
    found = evaluate(None, {"both": both[1:]}, data, max_new_tokens=None)
    loss = next(row["value"] for row in found.rows if row["metric"] == "loss")
    assert json.loads(results.read_text())["tasks"]["upper"]["loss"] == pytest.approx(loss, rel=1e-5)
    assert main(["generate", *both, "upper bat:"]) == 0
    others = ["--experts", "library/top", "library/first"]
    assert main(["merge", "--method", "Average", *others, "--out", "library/merged"]) == 0
    assert "top was trained on top of r, which is not listed and will be missed" in caplog.text


def test_what_cannot_be_beneath_is_refused(experts, tiny_llama_dir) -> None:
    folder = Path(experts[0]).parent
    first, second = (route(experts, folder / name, Energy()) for name in ("r", "s"))
    with pytest.raises(ValueError, match="r chooses by the input, so nothing can be added to it but what was trained"):
        runs.module(tiny_llama_dir, LoRAExpert, applied=[str(first.path), str(second.path)]).configure_model()
    with pytest.raises(ValueError, match="MoLoRAExpert chooses by the input, as r does, and the two could not be used"):
        runs.module(tiny_llama_dir, MoLoRAExpert, applied=[str(first.path)]).configure_model()


def test_what_was_trained_on_a_route_goes_on_no_other_of_the_same_state_and_needs_its_experts(
    experts, tiny_llama_dir
) -> None:
    folder, kept = Path(experts[0]).parent, Constant()
    below, other = route(experts[:2], folder / "r", kept), route(experts[1:], folder / "s", kept)
    record = make_record("made", below.record["base"], parents=as_parents([below]))
    write_expert(folder / "top", {name: Dense(torch.ones(shape)) for name, shape in WEIGHTS.items()}, record)
    model = Base.open(tiny_llama_dir).load()
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    attached(model, [below, folder / "top"]).remove()
    with pytest.raises(ValueError, match="s chooses by the input, so nothing can be added to it but what was trained"):
        attached(model, [other, folder / "top"])
    Path(experts[0]).rename(folder / "elsewhere")
    with pytest.raises(FileNotFoundError, match="r was made with upper, which is missing beside it"):
        attached(model, [below, folder / "top"])
    assert all(torch.equal(weight, start[name]) for name, weight in model.state_dict().items())
