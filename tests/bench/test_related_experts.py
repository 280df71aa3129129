"""benchmarks/related_experts.py: the numbers of parameters that it claims, and its tables."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from conftest import build_model, build_tokenizer
from testbed.here import work_here
from testbed.scripts import run_script
from transformers import LlamaForCausalLM

from modular_experts.injection import inject, named_experts

KINDS = ["XGBLoRA", "ReLoRA", "GLoRA, searched", "RECAST"]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
        work_here(patch, "related_worlds", "related_cost")
        yield importlib.import_module("related_experts")


def suite_model() -> LlamaForCausalLM:
    """Return a random model of the shapes of the suite's base."""
    return build_model("llama", hidden_size=96, intermediate_size=288, num_key_value_heads=4, head_dim=24)


def test_kinds_train_as_many_numbers_as_the_goals_say(script) -> None:
    counts = {}
    for name, kind in script.KINDS.items():
        inject(model := suite_model(), kind.plan)
        counts[name] = sum(p.numel() for _, expert in named_experts(model) for p in expert.parameters())
    assert counts["LoRA, rank 4"] == 4 * 2 * (4 * (96 + 96) + 3 * (96 + 288))
    assert counts["TT-LoRA"] <= counts["LoRA, rank 4"] / 6
    assert abs(counts["TT-LoRA, as LoRA 1"] / counts["LoRA, rank 1"] - 1) <= 0.02
    assert counts["AdaMix, nothing shared"] == 4 * counts["LoRA, rank 4"]
    ups, downs = 4 * 2 * (4 * 96 + 2 * 288 + 96), 4 * 2 * (4 * 96 + 2 * 96 + 288)
    assert counts["AdaMix"] == ups + 4 * downs
    assert counts["XGBLoRA"] == counts["LoRA, rank 1"]
    assert counts["ReLoRA"] == counts["LoRA, rank 4"]
    assert counts["GLoRA"] == counts["LoRA, rank 8"]
    assert script.KINDS["GLoRA, searched"].limit == counts["LoRA, rank 4"]
    assert counts["RECAST"] <= 200


def test_it_trains_merges_and_goes_on_where_it_was(script, tmp_path) -> None:
    suite_model().save_pretrained(tmp_path / "base-0")
    build_tokenizer().save_pretrained(tmp_path / "base-0")
    options = ["--quick", "--json", "--parts", "quality", "--kinds", *KINDS, "--work", tmp_path]
    first = json.loads(run_script("related_experts.py", *options))
    stored = (tmp_path / "quick.jsonl").read_text()
    assert json.loads(run_script("related_experts.py", *options)) == first
    options.remove("--json")
    table = run_script("related_experts.py", *options).splitlines()
    assert [line.split(" | ")[0] for line in table[-len(KINDS) :]] == [f"| {kind}" for kind in KINDS]
    assert (tmp_path / "quick.jsonl").read_text() == stored
    rows = {row["kind"]: row for row in first["quality"]}
    assert list(rows) == ["the base", "LoRA, rank 1", "LoRA, rank 4", *KINDS]
    for row in rows.values():
        assert 0 <= row["alone"]["exact_match"] <= 1 < row["merged held out"]["loss"]
    held = {name: row["optimizer_bytes"] for name, row in rows.items() if name in script.KINDS}
    # Two float32 of AdamW for each trained number; half of the two blocks hold none.
    assert held["LoRA, rank 4"] == 8 * rows["LoRA, rank 4"]["trained"] == 8 * held["XGBLoRA"]
    assert rows["LoRA, rank 4"]["alone difference"] == [0.0, 0.0]


def test_it_shows_the_cost(script, tmp_path) -> None:
    shown = run_script("related_experts.py", "--quick", "--parts", "cost", "--kinds", "XGBLoRA", "--work", tmp_path)
    rows = [line.split(" | ") for line in shown.splitlines() if line.startswith(("| LoRA", "| XGBLoRA"))]
    assert [row[0] for row in rows] == ["| LoRA, rank 8", "| LoRA, rank 1", "| XGBLoRA"]
    assert rows[0][3:] == ["1.00", "1.00 |"]
    assert rows[1][1] == rows[2][1] == "0.12"
