"""benchmarks/related_systems.py: equal parameters as it claims them, and its tables."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import build_model, build_tokenizer
from testbed.here import work_here
from testbed.scripts import run_script
from torch import nn
from transformers import LlamaForCausalLM

from modular_experts.injection import inject, named_experts
from modular_experts.suite.tasks import Reverse
from modular_experts.systems.hilo import HiLo
from modular_experts.systems.point_lora import PointLoRA
from modular_experts.systems.point_lora.plan import TokenSelection


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
        work_here(patch, "related_worlds", "related_cost")
        yield importlib.import_module("related_systems")


def suite_model() -> LlamaForCausalLM:
    """Return a random model of the shapes of the suite's base."""
    sizes = {"hidden_size": 96, "intermediate_size": 288, "num_key_value_heads": 4, "head_dim": 24}
    return build_model("llama", **sizes, max_position_embeddings=1024)


def smollm2_model() -> LlamaForCausalLM:
    """Return a random model of SmolLM2's linear layers, without their memory."""
    with torch.device("meta"):
        sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
        return build_model("llama", **sizes, num_attention_heads=9, num_key_value_heads=3, head_dim=64)


@pytest.mark.parametrize("size", ["trained", "active", "long"])
def test_sizes_are_equal_within_two_percent(script, size) -> None:
    counts = {}
    for name, system in script.SYSTEMS.items():
        if plan := getattr(system, size) or (system.trained if name == "LoRA" else None):
            inject(model := suite_model(), plan())
            counts[name] = script.parameters(model)["active" if size == "active" else "trained"]
    reference = counts.pop("LoRA")
    assert reference == 10 * 2 * (4 * (96 + 96) + 3 * (96 + 288))
    fewer = counts.pop("HiLo, fewer", 0)
    assert size == "long" or fewer < 0.8 * counts["MoLoRA"]
    for name, count in counts.items():
        assert round(abs(count / reference - 1), 6) <= 0.02, name


def test_hilo_on_the_shapes_of_smollm2_trains_as_many_numbers_as_its_formula(script) -> None:
    inject(model := smollm2_model(), HiLo(experts=[2, 4, 6, 8], ranks=[2, 8]))
    shapes = [(576, 576)] * 2 + [(192, 576)] * 2 + [(1536, 576)] * 2 + [(576, 1536)]
    wanted = 0
    for depth in range(30):
        experts, rank = [2, 4, 6, 8][depth * 4 // 30], round(2 + 6 * depth / 29)
        wanted += sum(experts * rank * (out + inputs) + experts * inputs for out, inputs in shapes)
    assert script.parameters(model)["trained"] == wanted == 9_490_176


def test_it_trains_tests_and_goes_on_where_it_was(script, tmp_path) -> None:
    suite_model().save_pretrained(tmp_path / "base-0")
    build_tokenizer().save_pretrained(tmp_path / "base-0")
    options = ["--quick", "--json", "--parts", "quality", "--systems", "MoLoRA", "GOAT", "--work", tmp_path]
    first = json.loads(run_script("related_systems.py", *options))
    stored = (tmp_path / "quick-systems.jsonl").read_text()
    assert json.loads(run_script("related_systems.py", *options)) == first
    options.remove("--json")
    table = run_script("related_systems.py", *options).splitlines()
    assert [line.split(" | ")[0] for line in table[-5:]] == ["| LoRA", *["| MoLoRA"] * 2, *["| GOAT"] * 2]
    assert (tmp_path / "quick-systems.jsonl").read_text() == stored
    rows = first["quality"]["rows"]
    assert [(row["system"], row["size"]) for row in rows] == [
        ("LoRA", "trained"),
        *((name, size) for name in ("MoLoRA", "GOAT") for size in ("trained", "active")),
    ]
    for row in rows:
        assert round(abs(row[row["size"]] - 1), 6) <= 0.02
        assert 0 <= row["held_in"]["exact_match"] <= 1 < row["held_out"]["loss"]


def test_it_shows_the_cost(script, tmp_path) -> None:
    shown = run_script("related_systems.py", "--quick", "--parts", "cost", "--systems", "GOAT", "--work", tmp_path)
    rows = [line.split(" | ") for line in shown.splitlines() if line.startswith(("| LoRA", "| GOAT"))]
    assert [row[0] for row in rows] == ["| LoRA", "| GOAT"]
    assert rows[0][3:] == ["1.00", "1.00 |"]


def test_words_are_hidden_in_capitals_and_answers_stay(script) -> None:
    task = Reverse(seed=1, train=20, validation=0, test=0)
    hidden = list(importlib.import_module("related_worlds").Among(task).rows())
    assert hidden == list(importlib.import_module("related_worlds").Among(task).rows())
    for row, plain in zip(hidden, task.rows(), strict=True):
        first, second, *letters, last = row["input"].split()
        assert [first, second, last] == ["order", "reverse", "="]
        assert 60 <= sum(letter.islower() for letter in letters) <= 120
        word = "".join(letter for letter in letters if letter.isupper())
        assert word in "".join(letters)
        assert plain == {
            "input": f"order reverse {' '.join(word.lower())} =",
            "target": row["target"],
            "split": row["split"],
        }


def test_a_word_is_selected_if_all_its_tokens_are(script) -> None:
    inject(model := suite_model(), PointLoRA(rank=1, tokens=2, hidden=1))
    selection = next(expert for _, expert in named_experts(model) if isinstance(expert, TokenSelection))
    # A token's score is its number.
    selection.embedding.weight.data = torch.arange(len(selection.embedding.weight)).float()[:, None].expand(-1, 96)
    selection.scorer = nn.Linear(96, 1, bias=False)
    nn.init.ones_(selection.scorer.weight)
    prompt = torch.tensor([9, 3, 8, 1])
    assert script.selects(model, prompt, torch.tensor([8, 9]))
    assert not script.selects(model, prompt, torch.tensor([3, 9]))


def test_it_looks_for_hidden_words_and_trains_on_files(script, tmp_path) -> None:
    suite_model().save_pretrained(tmp_path / "base-0")
    build_tokenizer().save_pretrained(tmp_path / "base-0")
    for task in importlib.import_module("merge_worlds").HELD_IN[:6]:
        rows = [{"input": f"{task} {number}", "target": "yes no"} for number in range(20)]
        (tmp_path / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--quick", "--json", "--parts", "needle", "real", "--real", tmp_path / "base-0", tmp_path]
    found = json.loads(run_script("related_systems.py", *options, "--systems", "HiLo, fewer", "--work", tmp_path))
    needle, real = found["needle"], found["real"]
    assert [row["system"] for row in needle["rows"]] == ["LoRA", "PointLoRA"]
    assert len(needle["selected"]) == 1
    assert [row["system"] for row in real["rows"]] == ["LoRA", "HiLo, fewer"]
    assert "held_out" in needle["rows"][1]
    assert "held_out" not in real["rows"][1]
