"""PEFT adapters that were read: base plus deltas computes what PEFT computes with the adapter on the base."""

import pytest
import torch
from peft import LoraConfig, ShiraConfig, SupertuningConfig
from safetensors.torch import load_file, save_file
from testbed.peft_adapters import PEFT_WARNINGS, configure, logits, peft_logits, save_adapter

from modular_experts.base import Base
from modular_experts.base.apply import applied
from modular_experts.deltas import LowRank, Sparse
from modular_experts.interop.peft import read_peft
from modular_experts.interop.peft.files import AdapterFiles

pytestmark = [pytest.mark.filterwarnings(line) for line in PEFT_WARNINGS]


def lora(**settings):
    return LoraConfig(**({"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | settings))


def gpt2(**settings):
    return lora(**({"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True} | settings))


def one_module(kind, **settings):
    return kind(target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", **settings)


PATTERNS = {
    "rank_pattern": {
        "layers.0.self_attn.q": 9,
        "layers.0.self_attn.q_proj": 2,
        r".*\.1\.mlp\.down_proj": 7,
        "q_proj": 3,
    },
    "alpha_pattern": {r"layers\.1\..*": 5, "down_proj": 1, "q_proj": 9},
}
ADAPTERS = {
    "patterns and rslora": ("llama", lora(use_rslora=True, **PATTERNS), LowRank),
    "embeddings": ("llama", lora(target_modules=["embed_tokens", "lm_head", "v_proj"], use_rslora=True), LowRank),
    "dora on embeddings": ("llama", lora(target_modules=["embed_tokens", "o_proj"], use_dora=True), None),
    "modules to save": ("llama", lora(target_modules=["o_proj"], modules_to_save=["lm_head", "norm"]), None),
    "trained biases": ("qwen2", lora(bias="all"), None),
    "biases of the adapted": ("qwen2", lora(bias="lora_only"), None),
    "lora bias": ("qwen2", lora(target_modules=["q_proj", "v_proj"], lora_bias=True, lora_alpha=3), None),
    "conv1d, wrongly declared": ("gpt2", gpt2(fan_in_fan_out=False), LowRank),
    "dora on conv1d": ("gpt2", gpt2(use_dora=True), None),
    "biases of conv1d": ("gpt2", gpt2(bias="all"), None),
    "lora bias of conv1d": ("gpt2", gpt2(lora_bias=True, use_rslora=True), None),
    "shira and modules to save": ("llama", one_module(ShiraConfig, r=2, modules_to_save=["lm_head"]), None),
    "super-tuning of the smallest": ("llama", one_module(SupertuningConfig, sparsity=0.7, select_top=False), Sparse),
    "supra with its own alpha": ("llama", one_module(SupertuningConfig, sparsity=0.9, r=3, lora_alpha=5), None),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_base_plus_deltas_computes_what_peft_computes(tiny, tmp_path, case):
    architecture, config, form = ADAPTERS[case]
    base = tiny(architecture)
    adapter = save_adapter(base, tmp_path / "adapter", config)
    expected, model = peft_logits(base, adapter), Base.open(base).load()
    assert (expected - logits(model)).abs().max() > 0.005
    deltas = dict(read_peft(adapter, base).deltas)
    with applied(model, [deltas]):
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    assert form is None or all(isinstance(delta, form) for delta in deltas.values()), deltas
    assert all(delta.dtype == torch.float32 for delta in deltas.values())


def _with(base, adapter):
    model = Base.open(base).load()
    with applied(model, [dict(read_peft(adapter, base).deltas)]):
        return logits(model)


@pytest.mark.parametrize("dora", [False, True])
def test_an_embedding_that_is_stored_with_its_adapter_takes_the_bases_place(tiny_llama_dir, tmp_path, dora):
    config = lora(target_modules=["embed_tokens", "q_proj"], use_dora=dora)
    adapter = save_adapter(tiny_llama_dir, tmp_path / "a", config)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    before = _with(tiny_llama_dir, adapter)
    change(adapter, lambda stored: stored | {key: stored[key] + 0.05 * torch.randn(99, 32)})
    expected = peft_logits(tiny_llama_dir, adapter)
    assert (expected - before).abs().max() > 0.01
    torch.testing.assert_close(_with(tiny_llama_dir, adapter), expected, rtol=0, atol=1e-5)


def test_a_legacy_file_is_read_without_running_code(tiny_llama_dir, tmp_path):
    adapter = save_adapter(tiny_llama_dir, tmp_path / "a", lora(), safe_serialization=False)
    assert (adapter / "adapter_model.bin").is_file()
    torch.testing.assert_close(_with(tiny_llama_dir, adapter), peft_logits(tiny_llama_dir, adapter), rtol=0, atol=1e-5)
    torch.save({"base_model.model.x": Trap()}, adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model.bin was not read: it asks to run .*exec, and no code in a fi"):
        read_peft(adapter)
    (adapter / "adapter_model.bin").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"adapter_model.bin was not read: it is damaged"):
        read_peft(adapter)
    torch.save({"base_model.model.x": 3}, adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model.bin is not what PEFT saves"):
        read_peft(adapter)


class Trap:
    """Runs code where a pickle is trusted."""

    def __reduce__(self):
        return exec, ("raise SystemExit('code was run')",)


def change(adapter, change):
    file = adapter / "adapter_model.safetensors"
    stored = {key: tensor.contiguous().clone() for key, tensor in change(load_file(file)).items()}
    save_file(stored, file, metadata={"format": "pt"})


@pytest.fixture
def adapter(tiny_llama_dir, tmp_path):
    return save_adapter(tiny_llama_dir, tmp_path / "adapter", lora())


SETTINGS = [
    ({"peft_type": "IA3"}, "has peft_type 'IA3'"),
    ({"alora_invocation_tokens": [3]}, "sets alora_invocation_tokens to [3], which may move weights"),
    ({"layer_replication": [[0, 2]]}, "sets layer_replication to"),
    ({"trainable_token_indices": [1]}, "sets trainable_token_indices to [1]"),
    ({"use_dora": True}, "sets use_dora to True"),
    ({"bias": "all"}, "sets bias to 'all'"),
    ({"modules_to_save": ["lm_head"]}, "sets modules_to_save to"),
    ({"brand_new": 3}, "sets brand_new to 3, which may move weights"),
    ({"init_lora_weights": "loftq"}, "init_lora_weights to 'loftq'"),
]


def test_an_adapter_with_any_other_setting_is_no_plain_lora(adapter):
    before = (adapter / "adapter_config.json").read_text()
    assert AdapterFiles(adapter).obstacle() is None
    for fields, sentence in SETTINGS:
        configure(adapter, **fields)
        assert sentence in AdapterFiles(adapter).obstacle()
        (adapter / "adapter_config.json").write_text(before)


STRANGERS = [
    (("layers.0.self_attn.q_proj", "layers.0.self_attn.q_prj"), r"belong to nothing in LlamaForCausalLM: "
     r"model.layers.0.self_attn.q_prj; did you mean model.layers.0.self_attn.q_proj\?"),
    (("model.model.layers", "model.layers"), r"nothing .*: layers.0.mlp.*; did you mean model.layers.0"),
    (("q_proj.lora_A", "q_proj.lora_C"), r"PEFT cannot load .*"),
    (("base_model.model.", "base."), r"does not begin with base_model.model."),
    (("mlp.down_proj", "mlp.act_fn"), r"mlp.act_fn is a SiLU.*; only a Linear, Conv1D or Embedding"),
]  # fmt: skip


def test_tensors_that_the_base_has_no_place_for_are_listed(adapter):
    file = adapter / "adapter_model.safetensors"
    before = file.read_bytes()
    for rename, sentence in STRANGERS:
        change(adapter, lambda stored, names=rename: {key.replace(*names): tensor for key, tensor in stored.items()})
        with pytest.raises(ValueError, match=sentence):
            dict(read_peft(adapter).deltas)
        file.write_bytes(before)


def test_a_whole_tensor_that_equals_the_base_moves_nothing(adapter, tiny_llama_dir):
    same = Base.open(tiny_llama_dir).load().lm_head.weight.detach()
    change(adapter, lambda stored: stored | {"base_model.model.lm_head.weight": same})
    assert "lm_head.weight" not in dict(read_peft(adapter).deltas)
    change(adapter, lambda stored: stored | {"base_model.model.lm_head.weight": same + 1})
    moved = dict(read_peft(adapter).deltas)["lm_head.weight"]
    torch.testing.assert_close(moved.dense(), torch.ones(99, 32))


def test_a_weight_that_the_base_ties_is_refused(tiny, tmp_path):
    for settings in ({"target_modules": ["wte"]}, {"modules_to_save": ["lm_head"]}):
        adapter = save_adapter(tiny("gpt2"), tmp_path / next(iter(settings)), gpt2(**settings))
        with pytest.raises(
            ValueError, match=r"moves one of transformer.wte.weight and lm_head.weight alone, .* one tensor"
        ):
            dict(read_peft(adapter).deltas)


def test_tokens_that_peft_moves_under_both_names_of_a_tied_tensor_are_imported(tiny, tmp_path):
    adapter = save_adapter(tiny("gpt2"), tmp_path / "tokens", gpt2(trainable_token_indices=[3, 5]))
    moved, model = dict(read_peft(adapter).deltas), Base.open(tiny("gpt2")).load()
    assert moved["transformer.wte.weight"].dense().any(1).nonzero()[:, 0].tolist() == [3, 5]
    with applied(model, moved):
        torch.testing.assert_close(logits(model), peft_logits(tiny("gpt2"), adapter), rtol=0, atol=1e-5)


@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_a_lora_that_peft_ties_as_its_base_does_moves_the_tied_tensor_once(tiny, tmp_path, modules):
    base, ways = tiny("llama", tie_word_embeddings=True), {"target_modules": [*modules, "q_proj"]}
    adapter = save_adapter(base, tmp_path / "tied", lora(ensure_weight_tying=True, **ways))
    moved, model = dict(read_peft(adapter).deltas), Base.open(base).load()
    assert [name for name in moved if "q_proj" not in name] == ["model.embed_tokens.weight"]
    with applied(model, moved):
        torch.testing.assert_close(logits(model), peft_logits(base, adapter), rtol=0, atol=1e-5)
    adapter = save_adapter(base, tmp_path / "parted", lora(**ways))
    with pytest.raises(
        ValueError, match=r"are one tensor \(tied\); make an untied copy, in Python Base.open\(.*\).unti"
    ):
        dict(read_peft(adapter).deltas)
    moved = dict(read_peft(adapter, Base.open(base).untie(tmp_path / "untied")).deltas)
    assert [name.split(".")[-2] for name in moved if "q_proj" not in name] == modules


def test_an_adapter_that_does_not_fit_its_base_is_refused(tiny, adapter):
    with pytest.raises(ValueError, match=r"belong to nothing in GPT2LMHeadModel"):
        read_peft(adapter, tiny("gpt2"))
    with pytest.raises(FileNotFoundError, match=r"base 'nowhere/at-all' was not found"):
        read_peft(adapter, "nowhere/at-all")
    configure(adapter, r=5)
    with pytest.raises(ValueError, match=r"has shape \(4, (32|48)\) and should have \(5, (32|48)\)"):
        read_peft(adapter)
    configure(adapter, base_model_name_or_path=None)
    with pytest.raises(ValueError, match="no base is named"):
        read_peft(adapter)
