"""Each script of benchmarks/ runs its smallest case as it stands, and the formulas of its tables are right."""

import copy
import importlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryFile
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_model, build_tokenizer, write_rows
from testbed import classifiers
from testbed.forked import ended, forked
from testbed.here import STUDY, Here, work_here
from testbed.peft_adapters import PEFT_WARNINGS
from testbed.scripts import BENCHMARKS, run_commands_here, run_script, shown

from modular_experts import SparseExpert, TaskMixture, fit
from modular_experts.deltas import Sparse
from modular_experts.injection import inject
from modular_experts.library import make_record, write_expert
from modular_experts.study.engines import ENGINES


@pytest.fixture
def script(monkeypatch):
    """Import a script of the benchmarks."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def test_sparse_step_trains_the_same_number_of_entries_in_each_row(monkeypatch) -> None:
    elsewhere = subprocess.run

    # Processes that measure are copies of this one, with its peak.
    def run(words: list[str], **how: Any) -> subprocess.CompletedProcess[str]:
        if words[0] != sys.executable:  # a compiler
            return elsewhere(words, **how)
        with TemporaryFile("w+") as printed:
            assert ended(forked(lambda: print(run_script("sparse_step.py", *words[2:]), file=printed, flush=True))) == 0
            printed.seek(0)
            return subprocess.CompletedProcess(words, 0, printed.read())

    monkeypatch.setattr(subprocess, "run", run)
    report = json.loads(run_script("sparse_step.py", "--quick", "--json"))
    assert report["complete"] is True
    rows = {row["name"]: row for row in report["model"]["rows"]}
    kept = 2 * 16 * (2 * (256 + 256) + 2 * (128 + 256) + 3 * (512 + 256))
    linear = 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 512 * 256) + 1024 * 256
    for name, row in rows.items():
        if name not in ("frozen", "full"):
            assert abs(row["kept"] / kept - 1) < 0.02
            backward = 1.5 if "LoRA" in name else 0.5
            assert row["floor"] == pytest.approx(1 + backward * row["kept"] / linear)


def test_packing(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path / "base")
    rows = [{"input": "x" * (1 + 7 * number % 30), "target": "ab", "split": "train"} for number in range(64)]
    (tmp_path / "data").mkdir()
    for name in ("one", "two"):
        write_rows(tmp_path / "data" / f"{name}.jsonl", rows)
    places = ["--model", tmp_path / "base", "--data", tmp_path / "data"]
    report = json.loads(run_script("packing.py", "--quick", "--json", *places))
    for row in report["rows"]:
        assert row["padding"]["packed"] < row["padding"]["plain"]
        assert row["loss"]["packed"] == pytest.approx(row["loss"]["plain"], rel=1e-5)
    assert shown("packing", report).count("\n| two | ") == 2


def test_study_cost(one_block, monkeypatch) -> None:
    run_commands_here(monkeypatch)
    work_here(monkeypatch, *STUDY)
    report = json.loads(run_script("study_cost.py", str(one_block), "--quick", "--json"))
    assert report["bare"] < report["study"]
    assert "testing 2 experts on 10 tasks" in shown("study_cost", report)


def test_time_to_quality(one_block, tmp_path: Path, monkeypatch) -> None:
    run_commands_here(monkeypatch)
    rows = [{"input": "x" * (1 + 7 * number % 30), "target": "ab", "split": "train"} for number in range(16)]
    rows += [{"input": "xx", "target": "ab", "split": "validation"}]
    write_rows(tmp_path / "task.jsonl", rows)
    words = ["--quick", "--json", "--data", tmp_path, "--task", "task", "--model", one_block, "--seeds", "3"]
    words += ["--out", tmp_path / "runs.jsonl", "--words", "5", "--tries", "full:1e-4:9", "LoRA-of-answers:1e-4:9"]
    report = json.loads(run_script("time_to_quality.py", *words))
    assert '"input": "the customer wrote this to x' in (tmp_path / "task-5.jsonl").read_text()
    peer, full, *_ = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert report["rows"][0]["gap"] == [pytest.approx(full["loss"] - peer["loss"])]
    assert report["rows"][0]["cpu"] == [pytest.approx(full["cpu"] / peer["cpu"])]


def test_own_expert(tmp_path, one_block, task_files) -> None:
    file = tmp_path / "report.json"
    how = ["--unseen", task_files["first"], "--rows", 4, "--draws", 1, "--json", file]
    printed = run_script("own_expert.py", one_block, task_files["upper"], task_files["reverse"], *how)
    assert [row["router"] for row in json.loads(file.read_text())] == ["Centroid", "Classifier", "KernelRidge"]
    assert "| 4 | `KernelRidge` | " in printed
    how += ["--encoder", classifiers.build("bert", tmp_path / "encoder"), "--reject", 0.2]
    printed = run_script("own_expert.py", one_block, task_files["upper"], task_files["reverse"], *how)
    assert "| 4 | `KernelRidge with the encoder` | " in printed


@pytest.mark.parametrize("kind", ["lora", "sparse"])
def test_answer_only(tmp_path, one_block, task_files, kind) -> None:
    file = tmp_path / "report.json"
    how = ["--kind", kind, "--acts", 1, 3, "--steps", 3, "--same", "steps", "--dtype", "float32", "--json", file]
    printed = run_script("answer_only.py", one_block, task_files["upper"], *how)
    assert "| upper | 0 | the answer and 3 before | 3 | " in printed
    whole, one, three = json.loads(file.read_text())

    assert whole["loss"] != one["loss"] != three["loss"]
    assert (whole["acts"], one["acts"], three["acts"]) == (0, 1, 3)


@pytest.mark.slow
@pytest.mark.filterwarnings(*PEFT_WARNINGS)
def test_answer_step() -> None:
    report = json.loads(run_script("answer_step.py", "--quick", "--json"))
    for measured in (report["time"], report["memory"]):
        assert [(row["shape"], row["peft"]) for row in measured] == [("200 / 4", 1)]
        assert all(row[way] > 0 for row in measured for way in ("LoRA of answers", "entries of answers"))


def test_new_task(tmp_path, one_block, task_files) -> None:
    file = tmp_path / "report.json"
    data = TaskMixture(task_files["upper"])
    expert = fit(one_block, data, SparseExpert, "q_proj", tmp_path / "upper", steps=2, trainer={"logger": False})
    how = ["--library", expert.path, "--tasks", task_files["first"], "--draws", 1, "--few", 4, "--many", 6, "--random"]
    printed = run_script("new_task.py", one_block, *how, "--steps", 2, 3, "--json", file)
    ((draw,),) = json.loads(file.read_text()).values()
    assert list(draw) == ["4 rows, a new expert", "6 rows, a new expert", "4 rows, adapt", "the same, random values"]
    assert f"| 4 rows, adapt | {draw['4 rows, adapt']['loss']:.2f}, " in printed


@pytest.mark.filterwarnings("ignore")
def test_selection_cost(tmp_path, one_block, monkeypatch) -> None:
    class Run:
        """A process of the script, which did all its steps when it was started."""

        def __init__(self, command: list[str], **how: Any) -> None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "stdin", io.StringIO("go\n" * 9))
                self.stdout = iter(run_script("selection_cost.py", *command[2:]).splitlines())
            self.stdin = io.StringIO()

    monkeypatch.setattr(subprocess, "Popen", Run)
    write_rows(tmp_path / "task.jsonl", [{"input": f"say {number}", "target": "a"} for number in range(20)])
    options = [one_block, tmp_path / "task.jsonl", "--ways", "step", "--steps", "4"]
    assert json.loads(run_script("selection_cost.py", *options))["choices"] >= 1


def test_choices_cost_what_their_steps_take_beyond_the_steps_of_a_run_that_chose_once(script) -> None:
    """The first choice took 2 s by its own clock, in a step that warmed up; the four others 1.5 s, and 5 MiB more."""
    tokens = np.array([200, 100, 300, 100, 200, 300, 100, 200, 100, 400])
    chosen = np.array([1, 0, 1, 0, 1, 1, 0, 1, 0, 0])
    mib = 2**20
    once = {"tokens": tokens, "seconds": 2 + tokens / 100, "peak": np.full(10, 900 * mib)}
    once["seconds"][0] += 3
    own = {
        "tokens": tokens,
        "chosen": chosen,
        "seconds": once["seconds"] + 1.5 * chosen * (np.arange(10) > 0),
        "peak": once["peak"] + 7 * mib + 5 * mib * chosen,
        "own": 2.0 * chosen,
        "largest": 2.5 * mib,
    }
    costs = script("selection_cost").compare(own, once)
    assert costs["choice_in_steps"] == pytest.approx(1.5 / (2 + tokens[1:] / 100).mean())
    assert costs["share_of_time"] == pytest.approx(8 / own["seconds"].sum())
    assert costs["more_peak_in_largest_gradients"] == 2.0


def test_related_cost(script, tmp_path, monkeypatch) -> None:
    work_here(monkeypatch, "modular_experts.study.processes")
    printed = run_script("related_cost.py", "--quick", "--names", "XGBLoRA", "GOAT", "--work", tmp_path)
    rows = [line.split(" | ")[0] for line in printed.splitlines()]
    assert [row for row in rows if row.startswith(("| LoRA", "| GOAT", "| XGBLoRA"))] == [
        "| LoRA, rank 8",
        "| XGBLoRA",
        "| LoRA",
        "| GOAT",
    ]


def test_mixtures_of_related_cost_train_as_many_numbers_as_the_lora(script) -> None:
    """In the linear layers of SmolLM2, without their memory."""
    related_cost = script("related_cost")
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    sizes |= {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
    counts = {}
    with torch.device("meta"):
        base = build_model("llama", **sizes)
    for name, plan in related_cost.PLANS["mixtures"].items():
        model = copy.deepcopy(base)
        inject(model, plan())
        counts[name] = related_cost.parameters(model)["trained"]
    reference = counts.pop("LoRA")
    assert reference == 30 * 18 * (2 * (576 + 576) + 2 * (192 + 576) + 3 * (1536 + 576))
    assert counts.pop("HiLo, fewer") < 0.8 * counts["MoLoRA"]
    for name, count in counts.items():
        assert round(abs(count / reference - 1), 6) <= 0.02, name


def test_both_sides_of_merge_speed_agree(script, tmp_path, monkeypatch) -> None:
    """Where a program and two modules that merge as ours stand in the place of a Python with mergekit."""
    from modular_experts.interop.mergekit.recipe import merge_recipe, read_recipe

    work = script("merge_work")

    # Merges run in this process: each takes a second, 2 MB before the work, 3 MB in it and 4 MB at most.
    def watch(python: str, kind: str, **task: Any) -> dict[str, Any]:
        result = work.KINDS[kind](**json.loads(json.dumps(task)))()
        return {"cpu": 1.0, "anonymous_before": 2e6, "anonymous": 3e6, "peak": 4e6, "found": result}

    for module in (work, script("merge_speed")):
        monkeypatch.setattr(module, "watch", watch)

    def run_merge(recipe: dict[str, Any], out: str, options: dict[str, Any]) -> None:
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        merge_recipe(read_recipe(tmp_path / "recipe.yaml"), out)

    config, merge = ModuleType("mergekit.config"), ModuleType("mergekit.merge")
    config.MergeConfiguration = SimpleNamespace(model_validate=dict)
    merge.MergeOptions, merge.run_merge = dict, run_merge
    for stub in (ModuleType("mergekit"), config, merge):
        monkeypatch.setitem(sys.modules, stub.__name__, stub)
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    options = ["--mergekit", program, "--tiny", "--methods", "linear", "ties", "--experts", "2", "3"]
    options += ["--repeats", "1", "--folder", tmp_path / "inputs", "--json", tmp_path / "report.json"]
    assert "Sparse experts to a checkpoint" in run_script("merge_speed.py", *options)
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["merges"]) == 4
    assert all(row["unequal_of_moved"] < 0.01 for row in report["merges"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "constants"),
    [
        ("mixture_step", [], {}),
        ("answer_logits", [], {}),
        ("quantised", [], {}),
        ("shared_prompts", [], {"EXPERTS": 2}),
        (
            "routing_cost",
            ["--dtype", "bfloat16"],
            {"PROMPT": 4, "WORKS": {"prefill 64": 2, "prefill 128": 4, "decode": 1}},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.filterwarnings("ignore", *PEFT_WARNINGS)
def test_a_script_prints_its_table(name: str, options: list[str], constants: dict[str, Any]) -> None:
    if name == "quantised":
        pytest.importorskip("bitsandbytes")
    report = json.loads(run_script(f"{name}.py", "--quick", "--json", *options, **constants))
    assert report["rows"]
    assert shown(name, report).count("\n| ") > len(report["rows"])


@pytest.mark.slow
def test_evaluation_cost(tiny_llama_dir: Path, tmp_path: Path) -> None:
    rows = [{"input": f"say {number}", "target": "a", "choices": ["a", "b"], "split": "test"} for number in range(4)]
    write_rows(tmp_path / "one.jsonl", rows)
    record = make_record("SparseExpert", {"id": "base", "revision": None, "fingerprint": "0" * 64}, tasks=["one"])
    delta = Sparse(torch.tensor([1, 5]), torch.ones(2), torch.Size((32, 32)))
    write_expert(tmp_path / "library/one", {"model.layers.0.self_attn.q_proj.weight": delta}, record)
    places = ["--model", tiny_llama_dir, "--data", tmp_path, "--experts", tmp_path / "library/{task}", "--tasks", "one"]
    table = run_script("evaluation_cost.py", *places, "--new-tokens", "2").splitlines()[-2:]
    assert [line.split(" | ")[0] for line in table] == ["| one", "| one, expert"]


@pytest.mark.slow
def test_engine_overhead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES, "local", Here)
    printed = run_script("engine_overhead.py", "--quick", "--engines", "local")
    assert re.search(r"^local +[\d.]+ s to start, +[\d.]+ ms a piece", printed)
