"""Scripts of benchmarks/ that take longer run as they stand, in small, and report what their pages state."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import write_rows
from testbed.here import Here
from testbed.peft_adapters import PEFT_WARNINGS
from testbed.scripts import run_script, shown

from modular_experts.deltas import Sparse
from modular_experts.library import make_record, write_expert
from modular_experts.study.engines import ENGINES

pytestmark = [pytest.mark.slow, *(pytest.mark.filterwarnings(line) for line in PEFT_WARNINGS)]


def test_experts_of_matrices_keep_less_for_backward_than_peft() -> None:
    rows = {row["name"]: row for row in json.loads(run_script("mixture_step.py", "--quick", "--json"))["rows"]}
    peer = rows["PEFT LoRA, target_parameters"]
    assert rows["LoRA"]["trained"] == peer["trained"]
    assert 0.99 * peer["trained"] < rows["entries"]["trained"] <= peer["trained"]
    assert rows["frozen"]["kept_over_peft"] < rows["LoRA"]["kept_over_peft"] < 1
    assert rows["entries"]["kept_over_peft"] < 1


def test_the_three_ways_are_timed_and_agree() -> None:
    report = json.loads(run_script("answer_logits.py", "--quick", "--json"))
    works = [(dtype, work) for dtype in ("float32", "bfloat16") for work in ("training step", "forward", "generation")]
    assert [(row["dtype"], row["work"]) for row in report["rows"]] == works
    for row in report["rows"]:
        assert row["places"] == 1
        assert 0.05 < row["slice"] < 1000
        if row["work"] != "generation":
            assert 0.05 < row["whole"] < 1000
            assert row["losses_apart"] < (1e-5 if row["dtype"] == "float32" else 1e-2)
    assert {"CPU", "threads", "torch"} <= set(report["machine"])
    assert all(row["losses_apart"] < 1e-5 and row["time"] > 0 for row in report["parts"])
    assert shown("answer_logits", report).count("\n| bfloat16, ") == 3


@pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.*:FutureWarning", "ignore:Sparse invariant:UserWarning"
)  # in PEFT
def test_sparse_experts_keep_nothing_of_a_quantised_weight() -> None:
    pytest.importorskip("bitsandbytes")
    report = json.loads(run_script("quantised.py", "--quick", "--json"))
    rows = {row["name"]: row for row in report["rows"]}
    assert rows["PEFT SHiRA"]["kept_over_peft"] > 2
    for name in ("LoRA", "entries, native", "tiles of 16, native", "rows, slices"):
        assert rows[name]["kept_over_peft"] <= 1.02
        assert 0.9 < rows[name]["trained"] / rows["PEFT LoRA"]["trained"] < 1.1
    assert all(row["over_peft"] > 0 for row in rows.values())
    assert "at most 1.02 | met |" in shown("quantised", report)


def test_an_evaluation_with_an_expert_has_two_lines(tiny_llama_dir: Path, tmp_path: Path) -> None:
    rows = [{"input": f"say {number}", "target": "a", "choices": ["a", "b"], "split": "test"} for number in range(4)]
    write_rows(tmp_path / "one.jsonl", rows)
    record = make_record("SparseExpert", {"id": "base", "revision": None, "fingerprint": "0" * 64}, tasks=["one"])
    weight = "model.layers.0.self_attn.q_proj.weight"
    delta = Sparse(torch.tensor([1, 5]), torch.ones(2), torch.Size((32, 32)))
    write_expert(tmp_path / "library/one", {weight: delta}, record)
    places = ["--model", tiny_llama_dir, "--data", tmp_path, "--experts", tmp_path / "library/{task}", "--tasks", "one"]
    table = run_script("evaluation_cost.py", *places, "--new-tokens", "2").splitlines()[-2:]
    assert [line.split(" | ")[0] for line in table] == ["| one", "| one, expert"]


def test_a_quick_run_measures_each_engine_that_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES, "local", Here)
    found = json.loads(run_script("engine_overhead.py", "--quick", "--json", "--engines", "local"))["local"]
    assert found["pieces"] == 4
    assert min(found["piece"], found["start"]) > 0
    printed = run_script("engine_overhead.py", "--quick", "--engines", "local")
    assert re.search(r"^local +[\d.]+ s to start, +[\d.]+ ms a piece", printed)


KINDS = ["entries", "tiles", "LoRA"]
ENCODED = [f"{kind}, int4" for kind in KINDS]
ARROWS = ["Arrow", "PEFT Arrow"]
LINEAR = 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 512 * 256) + 1024 * 256


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_every_kind_is_timed_beside_its_floor_and_its_goal() -> None:
    short = {"PROMPT": 4, "WORKS": {"prefill 64": 2, "prefill 128": 4, "decode": 1}}
    report = json.loads(run_script("routing_cost.py", "--quick", "--json", "--dtype", "bfloat16", **short))
    assert [row["work"] for row in report["rows"]] == ["prefill 64", "prefill 128", "decode"]
    for row in report["rows"]:
        assert row["base"] == 1
        assert all(0.1 < row[kind] < 100 for kind in [*KINDS, *ENCODED, "PEFT LoRA", *ARROWS])
    prefill, _, decode = report["rows"]
    kept = round(0.05 * 256 * 256) * 4 + round(0.05 * 128 * 256) * 4 + round(0.05 * 512 * 256) * 6
    assert prefill["entries, floor"] == pytest.approx(1 + kept / LINEAR)
    assert decode["entries, floor"] == pytest.approx(1 + 8 * 2 * kept / LINEAR)
    assert decode["entries, goal"] == pytest.approx(1 + 1.2 * (decode["entries, floor"] - 1))
    assert [row["kind"] for row in report["memory"]] == [*KINDS, *ENCODED, *ARROWS]
    held = {row["kind"]: row["held_over_packed"] for row in report["memory"] if row["kind"] != "PEFT Arrow"}
    assert shown("routing_cost", report).count("\n| bfloat16, ") == 3 + 8
    assert all(held[f"{kind}, int4"] < 0.6 * held[kind] for kind in KINDS)
    for row in report["memory"]:
        if row["kind"] in ENCODED:
            assert 1 < row["with_base"] < row["used_with_base"], "eight experts have been decoded"
    assert held["tiles"] == held["LoRA"] == 1
    assert 1 < held["entries"] < 1.1, "the row pointers are all that is added"
