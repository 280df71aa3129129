"""Experts of blocks, MLPs and whole models, of a plan whose parts share a gate: in, out, trained, stored."""

import copy
import pickle

import pytest
import torch
from conftest import ARCHITECTURES, build_model
from testbed import runs
from testbed.shared_gate import SharedGate, Shift
from testbed.systems import filled
from torch import nn

from modular_experts.base import Base
from modular_experts.evaluation import batch_losses
from modular_experts.injection import (
    describe_experts,
    eject,
    expert_state,
    extra_losses,
    inject,
    named_experts,
    task_vector,
)
from modular_experts.injection.attach import attached
from modular_experts.injection.save import save_expert
from modular_experts.library import open_expert
from modular_experts.systems.hilo import HiLo
from modular_experts.testing import check_plan
from modular_experts.training.export_expert import ExportExpert
from modular_experts.training.module import ExpertModule

LAYERS = {"gpt2": ["c_attn", "c_proj"], "neox": ["query_key_value"], "phi3": ["qkv_proj", "down_proj"]}
IDS = torch.arange(30).view(2, 15) + 3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_parts_go_in_are_trained_alone_and_come_out_bit_for_bit(architecture: str) -> None:
    model, base = build_model(architecture), build_model(architecture)
    names = [name for name, _ in base.named_modules()]
    found = inject(model, SharedGate(LAYERS.get(architecture, ["q_proj", "down_proj"])))
    assert found == inject(model, SharedGate(LAYERS.get(architecture, ["q_proj", "down_proj"])))
    assert sorted(found) == [name for name, _ in named_experts(model)]
    assert sum(name.endswith(".mlp") for name in found) == 2
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, base(IDS).logits)
    filled(model, 0.3)
    (batch_losses(model, {"input_ids": IDS, "attention_mask": IDS > 0, "labels": IDS})[0].sum()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == (".expert." in f".{name}"), name
    trained = model(IDS).logits
    assert (trained - base(IDS).logits).abs().max() > 1e-3
    eject(model)
    assert [name for name, _ in model.named_modules()] == names
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(IDS).logits, base(IDS).logits)


class Crooked(SharedGate):
    """Its MLPs do not start at the base."""

    def __call__(self, sites):
        return {**super().__call__(sites), "layers.0.mlp": lambda module: Shifted(24)}


class Shifted(Shift):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        nn.init.ones_(self.shift)


class Odd(SharedGate):
    """Its settings are no plain values."""

    def __init__(self, layers=frozenset({"q_proj", "down_proj"}), penalty: float = 0.1) -> None:
        super().__init__(layers, penalty)
        self.layers = frozenset(layers)


def test_the_battery_of_plans_passes_what_keeps_the_contract_and_notices_what_does_not() -> None:
    check_plan(SharedGate(), compile=False)
    check_plan(HiLo("all-linear", experts=[3], ranks=[2, 2], k=2, balance=0.0), compile=False)
    with pytest.raises(AssertionError, match=r"before training, an expert must leave the .* model"):
        check_plan(Crooked(), compile=False)
    with pytest.raises(AssertionError, match="the settings of a plan must be plain values"):
        check_plan(Odd(), compile=False)


def test_what_is_shared_exists_once_and_follows_the_model_in_copies() -> None:
    model = build_model("llama")
    inject(model, SharedGate())
    filled(model, 0.3)
    wanted = model(IDS).logits
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # A gate and a vector in each of two blocks, LoRAs of rank 2 at (32, 32) and (32, 48), and one factor.
    assert sum(parameter.numel() for parameter in trained) == 2 * (32 + 32 + 2 * 64 + 2 * 80) + 1
    assert sum(tensor.numel() for tensor in expert_state(model).values()) == sum(one.numel() for one in trained)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(IDS).logits, wanted)
        experts = dict(named_experts(twin))
        gate = experts["model.layers.1"]
        assert experts["model.layers.1.mlp.down_proj.weight"].gate is gate
        torch.nn.init.zeros_(gate.weight)
        assert not torch.equal(twin(IDS).logits, wanted)
        eject(twin)
        assert torch.equal(twin(IDS).logits, build_model("llama")(IDS).logits)
    assert torch.equal(model(IDS).logits, wanted)


def test_penalties_and_facts_of_all_parts_are_told() -> None:
    model = build_model("llama")
    inject(model, SharedGate(penalty=0.25))
    assert {name: term.item() for name, term in extra_losses(model).items()} == {"BlockGate": 0.25 * 2 * 32}
    facts = describe_experts(model)
    settings = {"layers": ["q_proj", "down_proj"], "penalty": 0.25}
    assert (facts["kind"], facts["hyperparameters"]) == ("SharedGate", settings)
    assert facts["plan"] == {"class": "testbed.shared_gate.SharedGate", "settings": settings}
    assert "its gate sees the block's input" in facts["not_mergeable_because"]
    assert not list(task_vector(model))


def test_an_exported_expert_is_opened_by_its_plan_alone(tiny_llama_dir, task_files, tmp_path, caplog) -> None:
    export = ExportExpert(str(tmp_path / "library"), "shared", monitor=None)
    module = ExpertModule(str(tiny_llama_dir), experts=SharedGate(["q_proj"], penalty=0.5), dtype="float64")
    with caplog.at_level("INFO"):
        runs.trainer(tmp_path, export, max_steps=4).fit(module, runs.mixture(task_files, tiny_llama_dir, seed=0))
    assert "in 2 weights and 5 other modules: 385 trained parameters" in caplog.text
    stored = open_expert(tmp_path / "library/shared")
    assert (stored.record["kind"], stored.record["plan"]["class"]) == ("SharedGate", "testbed.shared_gate.SharedGate")
    assert {name.rpartition("/")[0] for name in stored.state()} == {name for name, _ in named_experts(module.model)}
    model = Base.open(tiny_llama_dir).load("float64")
    base = model(IDS).logits
    with attached(model, stored):
        assert torch.equal(model(IDS).logits, module.model.eval()(IDS).logits)
        assert not torch.equal(model(IDS).logits, base)
    assert torch.equal(model(IDS).logits, base)
    assert not named_experts(model)


def test_a_built_in_plan_is_kept_and_opened_by_its_name(tiny_llama_dir, tmp_path) -> None:
    model = Base.open(tiny_llama_dir).load()
    inject(model, HiLo("q_proj", experts=[1, 3], ranks=[1, 4], k=2))
    filled(model, 0.3)
    stored = save_expert(model, tmp_path / "library/hilo", base=tiny_llama_dir)
    assert stored.record["plan"]["settings"]["experts"] == [1, 3]
    fresh = Base.open(tiny_llama_dir).load()
    with attached(fresh, stored):
        assert torch.equal(fresh(IDS).logits, model.eval()(IDS).logits)
    stored.record["plan"]["settings"]["depth"] = 3
    with pytest.raises(ValueError, match=r"hilo has settings that HiLo does not take .*depth"):
        attached(fresh, stored)
