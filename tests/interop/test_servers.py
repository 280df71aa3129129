"""Adapters for servers follow each server's rules, and hold what they say of the expert."""

import json
import math
import shlex

import gguf
import numpy
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from testbed.peft_adapters import PEFT_WARNINGS, make_expert, peft_logits, store

from modular_experts.__main__ import main
from modular_experts.base import Base
from modular_experts.base.apply import apply
from modular_experts.deltas import Dense, LowRank
from modular_experts.interop.servers import export_for, export_patch
from modular_experts.library import open_expert

pytestmark = [pytest.mark.filterwarnings(line) for line in PEFT_WARNINGS]
ATTENTION = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkvo"]
MLP = [f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
VLLM_RANKS = [1, 8, 16, 32, 64, 128, 256, 320, 512]  # --max-lora-rank of vLLM 0.33


def make(path, base, form="LowRank", names=(*ATTENTION, *MLP)):
    return make_expert(path, base, names, form)


def energies(expert):
    """Return the squared singular values of each delta, the largest first, by an independent decomposition."""
    return {n: numpy.linalg.svd(d.dense().double().numpy(), compute_uv=False) ** 2 for n, d in expert.items()}


@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_low_rank_experts_are_exact_at_one_rank_that_the_server_takes(server, tiny_llama_dir, tmp_path):
    experts = [make(tmp_path / "library" / name, tiny_llama_dir) for name in ("a", "b")]
    served = export_for(experts, tmp_path / "out", server)
    assert {name: one.rank for name, one in served.adapters.items()} == {"a": 8, "b": 8}
    for expert in experts:
        config = json.loads((tmp_path / "out" / expert.name / "adapter_config.json").read_text())
        stored = load_file(tmp_path / "out" / expert.name / "adapter_model.safetensors")
        assert (config["r"], config["lora_alpha"], config["bias"]) == (8, 8, "none")
        assert not config["rank_pattern"] | config["alpha_pattern"]
        assert config["modules_to_save"] is config["target_parameters"] is None
        assert len(stored) == 2 * len(expert)
        for name, delta in expert.items():
            down, up = (stored[f"base_model.model.{name.removesuffix('weight')}lora_{k}.weight"] for k in "AB")
            assert down.shape[0] == up.shape[1] == 8
            assert torch.equal(up[:, : delta.rank], delta.up)
            assert not up[:, delta.rank :].any()
            assert not down[delta.rank :].any()
    words = shlex.split(served.start)
    assert {f"{name}={tmp_path / 'out' / name}" for name in "ab"} <= set(words)
    assert str(tiny_llama_dir) in words


@pytest.mark.parametrize("form", ["Sparse", "BlockSparse", "Dense"])
@pytest.mark.parametrize("keep", [0.5, 0.9, 1.0])
def test_other_experts_take_the_smallest_rank_that_keeps_enough(form, keep, tiny_llama_dir, tmp_path):
    expert = make(tmp_path / "a", tiny_llama_dir, form)
    served = export_for([expert], tmp_path / "out", "vllm", keep)
    found = energies(expert)
    kept = {r: sum(e[:r].sum() for e in found.values()) / sum(e.sum() for e in found.values()) for r in VLLM_RANKS}
    rank = next(r for r in VLLM_RANKS if kept[r] >= keep - 1e-6)
    assert rank > 1
    written = served.adapters["a"]
    assert written.rank == rank
    assert 1 - written.relative_error**2 == pytest.approx(kept[rank], abs=1e-5)
    for name, weight in written.weights.items():
        assert 1 - weight.relative_error**2 == pytest.approx(found[name][:rank].sum() / found[name].sum(), abs=1e-5)


def test_what_a_server_does_not_take_is_refused_before_anything_is_written(tiny_llama_dir, tiny, tmp_path, monkeypatch):
    norm = make(tmp_path / "norm", tiny_llama_dir, "Dense", ["model.norm.weight"])
    alone = make(tmp_path / "alone", tiny_llama_dir, names=ATTENTION[:1])
    token = make(tmp_path / "token", tiny_llama_dir, names=["model.embed_tokens.weight"])
    other = make(tmp_path / "other", tiny("neox"), names=["gpt_neox.layers.0.mlp.dense_h_to_4h.weight"])
    good = make(tmp_path / "good", tiny_llama_dir)
    again = make(tmp_path / "more" / "good", tiny_llama_dir)
    full = make(tmp_path / "full", tiny_llama_dir, "Dense")
    ranks = dict.fromkeys(("vllm", "sglang", "llama.cpp"), (1, 8))
    monkeypatch.setattr("modular_experts.interop.servers._RANKS", ranks)
    for experts, server, sentence in [
        ([good, norm], "vllm", r"norm moves model.norm.weight, and vllm takes LoRAs of the weights of linear layers"),
        ([good, token], "llama.cpp", r"token moves model.embed_tokens.weight, and llama.cpp takes"),
        ([good, alone], "sglang", r"alone moves .*q_proj.weight and not .*k_proj.weight, and SGLang joins"),
        ([good, again], "vllm", r"two of the experts have one name"),
        ([full], "vllm", r"at rank 8, .* keeps \d+\.\d% of the squared norm of full, less than keep=0\.7"),
        ([other], "llama.cpp", r"the names of gpt_neox in GGUF files are not known"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            export_for(experts, tmp_path / "out", server)
        assert not list((tmp_path / "out").glob("*"))
    assert export_for([alone], tmp_path / "out", "vllm").adapters["alone"].rank == 1


def turned(weight, heads):
    """Return rows of q or k in llama.cpp's order: in each head of size s, row 2 i + j is row j s / 2 + i."""
    size = weight.shape[0] // heads
    order = [h * size + (r % 2) * size // 2 + r // 2 for h in range(heads) for r in range(size)]
    return weight[order]


@pytest.mark.parametrize("form", ["LowRank", "Sparse"])
def test_a_gguf_adapter_holds_the_deltas_in_the_order_of_llama_cpp(form, tiny_llama_dir, tmp_path):
    expert = make(tmp_path / "a", tiny_llama_dir, form)
    served = export_for([expert], tmp_path / "out", "llama.cpp")
    rank = served.adapters["a"].rank
    reader = gguf.GGUFReader(tmp_path / "out/a/adapter.gguf")
    facts = {key: field.contents() for key, field in reader.fields.items()}
    assert facts["general.architecture"] == "llama"
    assert (facts["general.type"], facts["adapter.type"]) == ("adapter", "lora")
    assert facts["adapter.lora.alpha"] == rank  # llama.cpp scales by alpha / rank
    stored = {one.name: gguf.quants.dequantize(one.data, one.tensor_type) for one in reader.tensors}
    names = {
        **{name: f"blk.0.attn_{name.split('.')[-2].replace('o_proj', 'output_proj')[:-5]}" for name in ATTENTION},
        **{name: f"blk.1.ffn_{name.split('.')[-2][:-5]}" for name in MLP},
    }
    config = Base.open(tiny_llama_dir).structure.model.config
    heads = {ATTENTION[0]: config.num_attention_heads, ATTENTION[1]: config.num_key_value_heads}
    assert set(stored) == {f"{name}.weight.lora_{k}" for name in names.values() for k in "ab"}
    for name, key in names.items():
        down, up = stored[f"{key}.weight.lora_a"], stored[f"{key}.weight.lora_b"]
        assert down.shape[0] == up.shape[1] == rank
        carried = served.adapters["a"].weights[name].delta.dense()
        expected = turned(carried, heads[name]) if name in heads else carried
        numpy.testing.assert_allclose(up @ down, expected.numpy(), atol=1e-6)
        if form == "LowRank":
            torch.testing.assert_close(carried, expert[name].dense())
    assert rank == 2 or form == "Sparse"
    assert f"--lora {tmp_path / 'out/a/adapter.gguf'}" in served.start


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("form", ["Sparse", "LowRank"])
def test_a_patched_base_has_the_bits_of_the_applied_checkpoint(form, dtype, tiny_llama_dir, tmp_path):
    model = Base.open(tiny_llama_dir).load(dtype)
    model.save_pretrained(tmp_path / "base")
    expert = make(tmp_path / "a", tmp_path / "base", form, [*ATTENTION, *MLP, "model.embed_tokens.weight"])
    written = export_patch(expert, tmp_path / "patch")
    apply([expert], tmp_path / "checkpoint", verify=False)
    base, expected = (load_file(tmp_path / one / "model.safetensors") for one in ("base", "checkpoint"))
    changed = 0
    with safe_open(tmp_path / "patch/patch.safetensors", "pt") as patch:
        shapes = json.loads(patch.metadata()["shapes"])
        assert set(patch.keys()) == {f"{name}/{part}" for name in shapes for part in ("indices", "values")}
        for name, shape in shapes.items():
            indices, values = patch.get_tensor(f"{name}/indices"), patch.get_tensor(f"{name}/values")
            assert (indices.dtype, values.dtype) == (torch.int32, base[name].dtype)
            assert indices.numel() == values.numel() == indices.unique().numel() <= math.prod(shape)
            assert list(base[name].shape) == shape
            assert (base[name].view(-1)[indices.long()] != values).all(), "a value that stays was sent"
            base[name].view(-1)[indices.long()] = values
            changed += indices.numel()
    assert set(shapes) == set(expert)
    assert written.changed == changed > 0
    for name, tensor in expected.items():
        assert torch.equal(base[name], tensor), name


def test_a_patch_that_is_not_finite_is_refused(tiny_llama_dir, tmp_path):
    base = Base.open(tiny_llama_dir).load()
    weight = base.get_parameter(ATTENTION[0]).data.fill_(3e38)
    base.save_pretrained(tmp_path / "base")
    store(tmp_path / "b", tmp_path / "base", {ATTENTION[0]: Dense(weight)})
    with pytest.raises(ValueError, match=r"is not finite in torch\.float32"):
        export_patch(tmp_path / "b", tmp_path / "patch")
    assert not (tmp_path / "patch").exists()


def test_the_command_prints_what_is_kept_and_how_to_start(tiny_llama_dir, tmp_path, capsys):
    library = [str(make(tmp_path / "a", tiny_llama_dir).path), str(make(tmp_path / "b", tiny_llama_dir, "Sparse").path)]
    out = tmp_path / "out"
    assert main(["export", *library, "--for", "vllm", "--keep", "0.8", "--out", str(out)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "a: rank 8, exactly the expert"
    assert shown[1].startswith("b: rank ")
    assert "% of the expert's squared norm, at least " in shown[1]
    rank = max(8, int(shown[1].split()[2].rstrip(",")))
    start = f"--enable-lora --max-loras 2 --max-lora-rank {rank} --lora-modules a={out}/a b={out}/b"
    assert shown[-1] == f"vllm serve {tiny_llama_dir} {start}"
    assert peft_logits(tiny_llama_dir, out / "a").isfinite().all()
    assert main(["export", library[1], "--form", "vllm-patch", "--out", str(tmp_path / "patch")]) == 0
    assert "a patch of 7 tensors, which replaces " in capsys.readouterr().out
    for words, sentence in [
        ([*library], "--form lora takes one expert, and 2 are named"),
        ([*library, "--for", "vllm", "--rank", "4"], "leave out --form, --rank and --wrapper"),
        ([library[0], "--for", "ollama"], "--for must be"),
        ([library[1], "--form", "vllm-patch", "--rank", "4"], "--rank to --form lora"),
        ([library[0], "--keep", "0.9"], "--keep belongs to --for SERVER"),
    ]:
        assert main(["export", *words, "--out", str(tmp_path / "never")]) == 2
        assert sentence in capsys.readouterr().err
    assert isinstance(open_expert(library[0])[MLP[0]], LowRank)
