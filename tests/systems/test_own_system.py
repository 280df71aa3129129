"""A system outside of the package (`tests/own_system`), named by dotted paths alone, goes the whole way."""

import json
from pathlib import Path

import own_system
import torch
import yaml
from safetensors.torch import load_file
from testbed.here import STUDY, work_here

from modular_experts.library import Library, open_expert
from modular_experts.reports import Results
from modular_experts.testing import check_callback, check_expert, check_plan, check_router


def test_its_parts_keep_their_contracts() -> None:
    check_expert(own_system.RayExpert, compile=False)
    check_plan(own_system.Rays(["q_proj", "v_proj"]), compile=False)
    check_router(own_system.Nearest())
    check_callback(own_system.Pauses)


PAUSES = ["--trainer.callbacks", '[{"class_path": "own_system.Pauses"}]']


def test_it_is_fitted_merged_routed_evaluated_and_exported(run, tiny_llama_dir, two_task_files) -> None:
    for name in ("a", "b"):
        how = ["--tasks", f"{name}.jsonl", "--steps=4", "--expert", "own_system.RayExpert", "--modules", "all-linear"]
        code, _, err = run("fit", "--base", tiny_llama_dir, *how, *PAUSES, "--out", f"library/{name}")
        assert code == 0, err
    record = open_expert("library/a").record
    assert (record["kind"], record["costs"]["rests"]) == ("RayExpert", 1)
    plan = ["--model.experts", "own_system.Rays", "--tasks", "a.jsonl", "--steps", "1", "--out", "library/gated"]
    assert run("fit", "--base", tiny_llama_dir, *plan)[0] == 0
    experts = ["--experts", "library/a", "library/b"]
    assert run("merge", *experts, "--method", "TaskArithmetic", "--out", "library/sum")[0] == 0
    total = open_expert("library/sum")
    for name, delta in open_expert("library/a").items():
        torch.testing.assert_close(total[name].dense(), delta.dense() + open_expert("library/b")[name].dense())
    router = ["--router", "own_system.Nearest", "--router.select", "own_system.Largest", "--router.select.weight=0.5"]
    code, _, err = run("route", *experts, *router, "--out", "library/routed")
    assert code == 0, err
    on_top = ["--applied", "library/routed", "--expert", "own_system.RayExpert", "--modules", "v_proj", "--steps", "1"]
    code, _, err = run("fit", "--base", tiny_llama_dir, "--tasks", "b.jsonl", *on_top, "--out", "library/top")
    assert code == 0, err
    assert [parent["name"] for parent in open_expert("library/top").record["parents"]] == ["routed"]
    evaluate = ["evaluate", "--tasks", "a.jsonl", "--out", "runs/all", "--max_new_tokens", "2"]
    evaluate += ["--experts", "library/a", "library/sum", "library/gated", "library/routed"]
    evaluate += ["both=library/routed+library/top"]
    code, _, err = run(*evaluate, "--trust", "own_system")
    assert code == 0, err
    models = {row["model"] for row in Results.read("runs/all/results.json").rows}
    assert models >= {"base", "a", "sum", "gated", "routed", "both"}
    code, _, err = run("export", "library/a", "--form", "own_system.RayFormat", "--out", "adapter")
    assert code == 0, err
    assert json.loads(Path("adapter/adapter_config.json").read_text())["r"] == 1
    stored = load_file("adapter/adapter_model.safetensors")
    lengths = [tensor.norm() for name, tensor in stored.items() if "lora_A" in name]
    torch.testing.assert_close(torch.stack(lengths), torch.ones(len(lengths)))
    assert run("export", "library/sum", "--form", "lora", "--rank", "2", "--out", "other")[0] == 0


def test_a_study_trains_merges_and_routes_it(run, tiny_llama_dir, two_task_files, monkeypatch) -> None:
    work_here(monkeypatch, *STUDY)
    layers = {"modules": ["q_proj"], "steps": 2, "trainer": {"callbacks": [{"class_path": "own_system.Pauses"}]}}
    plan = {"model": {"experts": "own_system.Rays"}, "steps": 2}
    kinds = {"rays": {"expert": "own_system.RayExpert", **layers}, "gated": plan}
    routes = [{"route": {"class_path": "own_system.Nearest"}, "name": "nearest", "kinds": ["rays"]}]
    merges = [{"method": "Average", "kinds": ["rays"]}, *routes]
    settings = {"base": str(tiny_llama_dir), "tasks": ["a.jsonl", "b.jsonl"], "experts": kinds, "merges": merges}
    Path("study.yaml").write_text(yaml.safe_dump(settings | {"max_new_tokens": 2}))
    how = ["--out", "runs/own", "--processes", "1", "--trust", "own_system"]
    code, _, err = run("study", "--config", "study.yaml", *how)
    assert code == 0, err
    experts = {f"{kind}-{task}" for kind in kinds for task in ("a", "b")}
    assert set(Library("runs/own/library")) == experts | {"merge-rays-Average", "route-rays-nearest"}
    models = {row["model"] for row in Results.read("runs/own/results.json").rows}
    assert {"rays Average", "rays nearest"} <= models
