"""Adapters of every PEFT type: base plus deltas computes what PEFT computes, or one sentence says why none can."""

import builtins
import json
import re
import sys
from pathlib import Path

import peft
import pytest
import torch
from peft import IA3Config, VeraConfig
from safetensors.torch import load_file, save_file
from testbed.peft_adapters import PEFT_WARNINGS, configure, logits, make_expert, peft_logits, save_adapter
from testbed.peft_types import CASES, committed, compare, make_adapter
from transformers import AutoModelForCausalLM

from modular_experts.base import Base
from modular_experts.base.apply import applied
from modular_experts.deltas import Dense, LowRank
from modular_experts.interop.import_expert import import_expert
from modular_experts.interop.peft import ask_peft, export
from modular_experts.interop.peft.asked import exact_form

pytestmark = [pytest.mark.filterwarnings(line) for line in PEFT_WARNINGS]
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("case", CASES)
def test_a_type_is_imported_as_peft_computes_it_or_refused_as_the_table_says(case, tiny, one_block, tmp_path):
    if case == "ADAMSS":
        pytest.importorskip("sklearn", reason="AdaMSS needs scikit-learn")
    bases = {"llama": one_block, "qwen2": tiny("qwen2")}
    row, _ = compare(case, bases.__getitem__, tmp_path)
    assert row.difference is None or row.difference < 1e-5
    assert committed().get(case) == (row.way, row.forms), "write the table anew (testbed/peft_types.py)"


def test_the_table_has_every_type_and_no_other():
    assert sorted(committed()) == sorted(CASES)


def test_what_is_trained_beside_the_adapters_comes_along(tiny, tmp_path):
    config = VeraConfig(r=2, target_modules=["q_proj"], bias="all", modules_to_save=["norm"], task_type="CAUSAL_LM")
    adapter = save_adapter(tiny("qwen2"), tmp_path / "vera", config)
    expert = import_expert(adapter, tmp_path / "library/vera")
    biases = {f"model.layers.{layer}.self_attn.{name}_proj.bias" for layer in (0, 1) for name in "qkv"}
    assert biases | {"model.norm.weight", Q} <= set(expert)
    model = Base.open(tiny("qwen2")).load()
    with applied(model, [expert]):
        torch.testing.assert_close(logits(model), peft_logits(tiny("qwen2"), adapter), rtol=0, atol=1e-5)


@pytest.fixture
def loha(tiny_llama_dir, tmp_path):
    return make_adapter("LOHA", tiny_llama_dir, tmp_path / "loha")


def refused(adapter, place):
    with pytest.raises(ValueError, match=r"\S") as caught:
        import_expert(adapter, place / "library/x")
    assert not (place / "library/x").exists()
    return str(caught.value)


def test_peft_gets_no_file_model_or_module_that_a_configuration_names(tiny_llama_dir, tmp_path, monkeypatch):
    adapter = make_adapter("LORA, use_qalora", tiny_llama_dir, tmp_path / "lora")
    before = (adapter / "adapter_config.json").read_text()
    for fields, named in (
        ({"megatron_config": {"a": "b"}, "megatron_core": "antigravity"}, "megatron_config"),
        ({"velora_config": None, "target_modules_file": "x.pt"}, "target_modules_file"),
        ({"kasa_config": {"beta": {"cache": "x.pt"}}}, "kasa_config"),
    ):
        configure(adapter, **fields)
        assert f"sets {named} to" in refused(adapter, tmp_path)
        (adapter / "adapter_config.json").write_text(before)
    shadow = {"peft_type": "SHADOW", "shadow_model": "owner/model", "base_model_name_or_path": str(tiny_llama_dir)}
    (adapter / "adapter_config.json").write_text(json.dumps(shadow))
    assert "sets shadow_model to 'owner/model'; PEFT might open or run" in refused(adapter, tmp_path)
    (adapter / "adapter_config.json").write_text(before)
    configure(adapter, auto_mapping={"parent_library": "antigravity", "base_model_class": "x"}, revision="other")
    forbidden, real = [], builtins.__import__

    def watch(name, *rest, **more):
        forbidden.extend([name] if name == "antigravity" else [])
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", watch)
    import_expert(adapter, tmp_path / "library/x", base=tiny_llama_dir)
    assert not forbidden


def test_only_peft_files_known_to_fetch_or_import_do_so():
    """A newer PEFT whose tuners open other things than these must be looked at before its types are imported."""
    tuners = Path(peft.__file__).parent / "tuners"
    opens = r"import_module\(|torch_load\(|torch\.load\(|hf_hub_download\(|\.from_pretrained\(|exec\(|pickle\.load"
    code = re.compile(rf"^(?!\s*(?:>>>|#|\.\.\.)).*(?:{opens})", re.MULTILINE)
    found = {file.relative_to(tuners).as_posix() for file in tuners.rglob("*.py") if code.search(file.read_text())}
    called_by_the_user = {"lora/corda.py", "lora/loraga.py", "lora/arrow.py", "cartridge/utils.py"}
    refused = {"lora/tp_layer.py", "shadow/model.py", "shadow/diffusion_models.py"}
    moves_no_weight = {"xlora/model.py", "multitask_prompt_tuning/model.py", "prompt_tuning/model.py"}
    in_a_text = {"lora/torchao.py", "tuners_utils.py"}
    assert found - called_by_the_user - refused - moves_no_weight - in_a_text == set()


def test_damaged_tensors_are_refused_and_pickled_ones_never_given_to_peft(loha, tmp_path):
    file = loha / "adapter_model.safetensors"
    stored = load_file(file)
    first = min(stored)
    for tensors, sentence in (
        ({key: tensor for key, tensor in stored.items() if key != first}, f"has no {first}"),
        (stored | {"base_model.model.strange": torch.ones(2)}, "holds the unknown base_model.model.strange"),
        (stored | {first: torch.ones(3, 5)}, "size mismatch"),
    ):
        save_file(tensors, file, metadata={"format": "pt"})
        assert sentence in refused(loha, tmp_path)
    file.write_bytes(b"nonsense")
    assert "is damaged" in refused(loha, tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors is missing"):
        import_expert(loha, tmp_path / "library/x")
    torch.save(stored, loha / "adapter_model.bin")
    assert "adapter_model.bin is pickled, and PEFT gets only safetensors" in refused(loha, tmp_path)


@pytest.mark.parametrize("rank", [1, 5, 16, 17, 30])
def test_a_product_of_factors_gets_its_rank_back(rank):
    draw = torch.Generator().manual_seed(rank)
    up, down = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((96, rank), (rank, 80)))
    product = up @ down
    found = exact_form(product.float())
    assert isinstance(found, LowRank)
    assert found.rank == rank
    assert (found.dense().double() - product).norm() < 2e-6 * product.norm()


def test_few_entries_of_a_transposed_delta_are_kept():
    moved = torch.zeros(6, 50)
    moved[2, [1, 7]], moved[4, 9] = 1.0, 2.0
    assert torch.equal(exact_form(moved.T).dense(), moved.T)


def test_rounding_of_a_merge_does_not_hide_a_rank():
    draw = torch.Generator().manual_seed(0)
    base, up, down = (torch.randn(*shape, generator=draw) for shape in ((96, 80), (96, 3), (3, 80)))
    moved = (base + 1e-4 * up @ down) - base
    assert isinstance(exact_form(moved), Dense)
    found = exact_form(moved, rounding=torch.finfo(torch.float32).eps * base.norm().item())
    assert isinstance(found, LowRank)
    assert found.rank == 3


def test_rounding_of_large_logits_is_no_reason_to_refuse_an_adapter_and_a_wrong_delta_is(
    tiny_llama_dir, tmp_path, monkeypatch
):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    model.lm_head.weight.data *= 1e5
    model.save_pretrained(tmp_path / "base")
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    adapter = save_adapter(tmp_path / "base", tmp_path / "ia3", config, spread=30.0)
    expert = import_expert(adapter, tmp_path / "library/ia3")
    assert expert.record["source"]["largest_difference"] > 1e-3
    # In float64 PEFT's model computes what base plus deltas does.
    tuned = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), adapter).double()
    moved = AutoModelForCausalLM.from_pretrained(tmp_path / "base").double()
    for name, delta in expert.items():
        moved.get_parameter(name).data += delta.dense().double()
    wanted = logits(tuned)
    torch.testing.assert_close(logits(moved), wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())
    merge_layer = peft.tuners.ia3.Linear.merge

    def wrong(layer, *given, **named):
        merge_layer(layer, *given, **named)
        layer.get_base_layer().weight.data *= 1.05

    monkeypatch.setattr(peft.tuners.ia3.Linear, "merge", wrong)
    assert "so it does more than move weights" in refused(adapter, tmp_path)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("import a_module_of_another_package", "is installed and cannot be imported .No module named 'a_module_of_an"),
        ("from json import a_name_of_a_newer_one", "is installed and cannot be imported .cannot import name 'a_name_"),
        ("raise ModuleNotFoundError(name='peft')", r"without PEFT|PEFT checks each adapter, and is not installed"),
    ],
)
def test_peft_is_called_missing_only_where_it_is(loha, tiny_llama_dir, tmp_path, monkeypatch, source, sentence):
    expert = make_expert(tmp_path / "expert", tiny_llama_dir, ["model.layers.0.self_attn.q_proj.weight"])
    for name in [name for name in sys.modules if name.partition(".")[0] == "peft"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft/__init__.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        ask_peft(loha, tiny_llama_dir)
    with pytest.raises(ValueError, match=sentence):
        export(expert, tmp_path / "adapter", "lora")
