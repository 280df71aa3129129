"""benchmarks/related_cost.py: equal numbers of parameters as it claims them, and its table."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import build_model
from testbed.here import work_here
from testbed.scripts import run_script
from transformers import LlamaForCausalLM

from modular_experts.injection import inject


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
        work_here(patch, "modular_experts.jobs")
        yield importlib.import_module("related_cost")


def smollm2_model() -> LlamaForCausalLM:
    """Return a random model of SmolLM2's linear layers, without their memory."""
    with torch.device("meta"):
        sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
        return build_model("llama", **sizes, num_attention_heads=9, num_key_value_heads=3, head_dim=64)


def counted(script: ModuleType, part: str, name: str) -> int:
    inject(model := smollm2_model(), script.PLANS[part][name]())
    return script.parameters(model)["trained"]


def test_mixtures_train_as_many_numbers_as_the_lora(script) -> None:
    counts = {name: counted(script, "mixtures", name) for name in script.PLANS["mixtures"]}
    reference = counts.pop("LoRA")
    assert reference == 30 * 18 * (2 * (576 + 576) + 2 * (192 + 576) + 3 * (1536 + 576))
    assert counts.pop("HiLo, fewer") < 0.8 * counts["MoLoRA"]
    for name, count in counts.items():
        assert round(abs(count / reference - 1), 6) <= 0.02, name


def test_experts_train_as_many_numbers_as_the_goals_say(script) -> None:
    counts = {name: counted(script, "experts", name) for name in ("LoRA, rank 8", "LoRA, rank 4", "AdaMix", "GLoRA")}
    assert counts["LoRA, rank 8"] == 2 * counts["LoRA, rank 4"] == counts["GLoRA"]
    assert counts["LoRA, rank 4"] < counts["AdaMix"] < 4 * counts["LoRA, rank 4"]
    assert counted(script, "experts", "TT-LoRA") <= counts["LoRA, rank 4"] / 6
    assert counted(script, "experts", "AdaMix, nothing shared") == 4 * counts["LoRA, rank 4"]


def test_it_shows_the_costs(script, tmp_path) -> None:
    names = ["--names", "XGBLoRA", "GOAT"]
    shown = run_script("related_cost.py", "--quick", *names, "--work", tmp_path)
    rows = [line.split(" | ") for line in shown.splitlines() if line.startswith(("| LoRA", "| GOAT", "| XGBLoRA"))]
    assert [row[0] for row in rows] == ["| LoRA, rank 8", "| XGBLoRA", "| LoRA", "| GOAT"]
    assert rows[0][3:] == rows[2][3:] == ["1.00", "1.00 |"]
    assert rows[1][1] == "0.12"
    stored = (tmp_path / "experts-quick.jsonl").read_text()
    run_script("related_cost.py", "--quick", *names, "--work", tmp_path)
    assert (tmp_path / "experts-quick.jsonl").read_text() == stored
