"""GLoRA as PEFT's own adapter: PEFT computes what the expert does, whatever the path of each layer."""

import json
import random
import sys
from pathlib import Path

import peft
import pytest
import torch
from conftest import TARGETS, build_model, build_tokenizer
from safetensors.torch import load_file
from testbed.peft_adapters import PEFT_WARNINGS, logits, peft_logits
from transformers import AutoModelForCausalLM

from modular_experts.__main__ import main
from modular_experts.base import Base
from modular_experts.experts import LoRAExpert
from modular_experts.injection import expert_layers, inject
from modular_experts.injection.save import save_expert
from modular_experts.interop.peft import export
from modular_experts.systems.glora import GLoRAExpert
from modular_experts.systems.glora.expert import GLoRAPath
from modular_experts.systems.glora.peft import GloraFormat

pytestmark = [pytest.mark.filterwarnings(line) for line in PEFT_WARNINGS]
LARGEST = {"a": "lora", "b": "lora", "c": "lora", "d": "vector", "e": "vector"}
WITHOUT_BIAS = {"a": "lora", "b": "lora"}


@pytest.fixture(scope="module")
def base_of(tiny, tmp_path_factory):
    """Return the directory of a tiny model; `biased` is a Llama with a bias in each layer, not zero."""
    path = tmp_path_factory.mktemp("biased")
    model = build_model("llama", attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(generator=torch.Generator().manual_seed(len(name)), std=0.1)
    model.save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return lambda architecture: path if architecture == "biased" else tiny(architecture)


def trained(base, out, settings, path_of=None, targets="all-linear", **how):
    """Store a GLoRA of random numbers, whose layers keep the paths that `path_of` gives; return it and its logits."""
    model = Base.open(base).load()

    def make(weight, site):
        return GLoRAExpert(weight, rank=3, **(WITHOUT_BIAS if site.module.bias is None else settings))

    inject(model, make, targets)
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for number, (_, layer) in enumerate(expert_layers(model)):
            for parameter in layer.expert.parameters():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=draw))
            if path_of is not None:
                layer.expert = layer.expert.only(path_of(number, layer.expert.choices()), layer.matrix)
    return save_expert(model, out, base=base, **how).path, logits(model)


def many(number, choices):
    """Return a path for the layer of a number, drawn from all paths."""
    draw = random.Random(number)
    return GLoRAPath(*(draw.choice(kinds) for kinds in choices.values()))


@pytest.mark.parametrize(
    ("architecture", "settings"), [("llama", WITHOUT_BIAS), ("biased", LARGEST), ("qwen2", LARGEST)]
)
def test_peft_computes_what_layers_of_all_kinds_of_paths_do_together_and_merged(
    base_of, tmp_path, architecture, settings, capsys
):
    base = base_of(architecture)
    expert, wanted = trained(base, tmp_path / "one", settings, many)
    written = export(expert, tmp_path / "adapter", GloraFormat())
    assert (wanted - logits(Base.open(base).load())).abs().max() > 0.1
    torch.testing.assert_close(peft_logits(base, tmp_path / "adapter"), wanted, rtol=0, atol=2e-5)
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded.merge_and_unload()), wanted, rtol=0, atol=2e-5)
    assert written.check.loaded_with == "peft 0.21.2"
    assert written.relative_error == 0.0
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    biased = architecture != "llama"
    assert [config[f"config_{parts}"] for parts in ("A_B", "C", "D_E")] == (
        ["lora", "lora", "vector"] if biased else ["lora", "none", "none"]
    )
    assert any(name.endswith("bias") for name in written.weights) == biased
    # The command writes the same, and counts what the format adds.
    assert main(["export", "--experts", str(expert), "--form", "glora", "--out", str(tmp_path / "again")]) == 0
    told = capsys.readouterr().out
    assert "loaded again with peft 0.21.2" in told
    assert "entries, because the format asks for fixed numbers of them" in told
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("adapter", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("both", "c", "rest"), [("lora", "lora", "vector"), ("vector", "vector", "constant"), ("constant", "none", "none")]
)
def test_of_equal_layers_the_adapter_holds_the_experts_numbers_and_what_peft_itself_would_save(
    base_of, tmp_path, both, c, rest
):
    base = base_of("biased")
    settings = {"a": both, "b": both, "c": c, "d": rest, "e": rest}
    expert, wanted = trained(base, tmp_path / "one", settings, targets=TARGETS["llama"])
    written = export(expert, tmp_path / "adapter", GloraFormat())
    torch.testing.assert_close(peft_logits(base, tmp_path / "adapter"), wanted, rtol=0, atol=2e-5)
    config = peft.PeftConfig.from_pretrained(tmp_path / "adapter")
    theirs = peft.get_peft_model_state_dict(peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config))
    stored = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert {key: tensor.shape for key, tensor in stored.items()} == {key: one.shape for key, one in theirs.items()}
    state = load_file(expert / "state.safetensors")
    for key, tensor in state.items():
        weight, _, name = key.rpartition("/")
        part, half = name.split("_")
        last = {"up": "Xd", "down": "Xu"}[half] if settings[part] == "lora" else "X"
        mine = stored[f"base_model.model.{weight.removesuffix('.weight')}.glora_{part.upper()}.{last}"]
        assert torch.equal(mine.flatten(), tensor.flatten())
    assert written.padding == sum(one.numel() for one in stored.values()) - sum(one.numel() for one in state.values())
    assert (written.padding == 0) == (c != "none")


def test_a_layer_whose_bias_alone_moves_and_one_that_keeps_nothing(base_of, tmp_path):
    paths = [GLoRAPath("none", "none", "none", "none", "vector"), GLoRAPath(*["none"] * 5)]
    base = base_of("biased")
    expert, wanted = trained(base, tmp_path / "one", LARGEST, lambda number, _: paths[number % 2], TARGETS["llama"])
    written = export(expert, tmp_path / "adapter", GloraFormat())
    torch.testing.assert_close(peft_logits(base, tmp_path / "adapter"), wanted, rtol=0, atol=2e-5)
    layers = {name.rpartition(".")[0] for name in written.weights}
    assert written.weights.keys() == {f"{name}.{end}" for name in layers for end in ("weight", "bias")}
    assert len(layers) == 2
    stored = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert {tensor.numel() for key, tensor in stored.items() if "glora_A" in key or "glora_B" in key} == {1}


def test_what_pefts_glora_cannot_hold_is_refused_with_what_works(base_of, tmp_path, monkeypatch):
    def refused(expert: Path, sentence: str) -> None:
        with pytest.raises(ValueError, match=sentence):
            export(expert, tmp_path / "adapter", GloraFormat())
        assert not (tmp_path / "adapter").exists()

    llama, gpt2, biased = base_of("llama"), base_of("gpt2"), base_of("biased")
    conv = "transformer.h.0.attn.c_attn"
    moving, _ = trained(gpt2, tmp_path / "moving", LARGEST, targets=conv)
    linear = f"can only move the weight and bias of a Linear, and moving also moves {conv}.bias, {conv}.weight; "
    refused(moving, linear + "write a full checkpoint with `apply`$")
    still, _ = trained(gpt2, tmp_path / "still", WITHOUT_BIAS, targets=conv)
    refused(still, "with `apply`, or approximate it as lora with a rank$")
    model = Base.open(llama).load()
    inject(model, LoRAExpert, "q_proj")
    refused(save_expert(model, tmp_path / "lora", base=llama).path, "LoRAExpert, .* export it as lora, with a rank")
    one, _ = trained(biased, tmp_path / "one", LARGEST, targets="q_proj")
    above, _ = trained(biased, tmp_path / "above", LARGEST, targets="q_proj", applied=[one])
    refused(above, "above was trained on top of one, whose weights its parts multiply")
    monkeypatch.setitem(sys.modules, "peft", None)
    refused(one, "PEFT checks each adapter, and is not installed")
