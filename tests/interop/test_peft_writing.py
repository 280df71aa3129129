"""Written PEFT adapters: PEFT computes with them what base plus deltas does, and every loss is reported."""

import json
from functools import partial

import numpy
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from testbed.mixture_bases import mixture
from testbed.peft_adapters import PEFT_WARNINGS, delta_of, logits, make_expert, peft_logits, store

from modular_experts.base import Base
from modular_experts.base.apply import applied
from modular_experts.deltas import Dense, LowRank, Sparse
from modular_experts.experts import LoRAExpert
from modular_experts.injection import expert_layers, inject
from modular_experts.injection.save import save_expert
from modular_experts.interop.peft import LoraFormat, ShiraFormat, SupertuningFormat, export, read_peft

pytestmark = [pytest.mark.filterwarnings(line) for line in PEFT_WARNINGS]
LAYER = "model.layers.0"
LLAMA = [f"{LAYER}.self_attn.q_proj.weight", f"{LAYER}.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"]
GPT2 = [f"transformer.h.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]


def expected_logits(base, deltas, tokens=None):
    model = Base.open(base).load()
    with applied(model, [deltas]):
        return logits(model, tokens)


CASES = {
    "lora of embeddings": ("llama", [*LLAMA, "model.embed_tokens.weight", "lm_head.weight"], "LowRank", LoraFormat()),
    "lora of conv1d and embeddings": ("gpt2", [*GPT2, "transformer.wpe.weight"], "LowRank", LoraFormat()),
    "super-tuning of tiles": ("llama", LLAMA, "BlockSparse", SupertuningFormat()),
    "shira of tiles": ("llama", LLAMA, "BlockSparse", ShiraFormat()),
}


@pytest.mark.parametrize("case", CASES)
def test_peft_computes_what_base_plus_deltas_does_and_reading_back_gives_the_same_bits(tiny, tmp_path, case):
    architecture, names, form, kind = CASES[case]
    base = tiny(architecture)
    expert = make_expert(tmp_path / "one", base, names, form)
    written = export(expert.path, tmp_path / "adapter", kind)
    expected = expected_logits(base, dict(expert))
    assert (expected - logits(Base.open(base).load())).abs().max() > 0.01
    torch.testing.assert_close(peft_logits(base, tmp_path / "adapter"), expected, rtol=0, atol=1e-5)
    assert written.check.loaded_with == "peft 0.21.2"
    assert 0 <= written.check.mean_difference <= written.check.largest_difference < 1e-5
    assert written.relative_error < 1e-6
    assert list(written.weights) == sorted(names)
    back = dict(read_peft(tmp_path / "adapter").deltas)
    assert back.keys() == set(expert)
    for name, delta in expert.items():
        assert torch.equal(back[name].dense(), delta.dense()), name
        if form == "LowRank":
            assert torch.equal(back[name].up, delta.up)
        assert written.weights[name].lost == 0.0


def test_padding_stands_at_places_that_are_not_kept_each_one_once(tiny_llama_dir, tmp_path):
    expert = make_expert(tmp_path / "one", tiny_llama_dir, LLAMA, "Sparse")
    for form in ("shira", "supertuning"):
        written = export(expert.path, tmp_path / form, form)
        stored = load_file(tmp_path / form / "adapter_model.safetensors")
        counts = sum(tensor.numel() for key, tensor in stored.items() if key.endswith(("shira_weight", "values")))
        kept = {name: weight.delta for name, weight in written.weights.items()}
        for name, delta in expert.items():
            assert kept[name].support_size - delta.support_size == written.weights[name].padding >= 0
            assert set(delta.indices.tolist()) <= set(kept[name].indices.tolist())
            assert kept[name].indices.unique().numel() == kept[name].support_size, "a place was named twice"
        assert written.padding == counts - sum(delta.support_size for delta in expert.values())
        manifest = json.loads((tmp_path / form / "modular_experts.json").read_text())
        assert manifest["adapter"]["padding"] == written.padding


def test_super_tunings_sparsity_leaves_room_for_every_entry_after_rounding():
    for kept in (1, 4, 7, 10, 11, 22, 307, 1535, 1536):
        delta = Sparse(torch.arange(kept, dtype=torch.int32), torch.ones(kept), torch.Size((48, 32)))
        fitted = SupertuningFormat().fit_to({"a": delta, "b": Sparse.zero((16, 48))}, "ab")
        sparsity = fitted.configuration({}, {})["sparsity"]
        assert 0 <= sparsity < 1
        assert int(1536 * (1 - sparsity)) == max(kept, 2)  # one entry of the smaller weight is two of this one
        assert int(768 * (1 - sparsity)) >= 1


def test_shira_takes_the_smallest_r_that_holds_every_module():
    deltas = {str(n): Sparse(torch.arange(n, dtype=torch.int32), torch.ones(n), torch.Size((16, 32))) for n in (3, 97)}
    assert ShiraFormat().fit_to(deltas, ["3", "97"]).configuration({}, {})["r"] == 3
    assert ShiraFormat().fit_to(deltas, ["3"]).configuration({}, {})["r"] == 1


def test_what_an_approximation_loses_is_told_for_each_weight_and_in_all(tiny_llama_dir, tmp_path):
    shapes = Base.open(tiny_llama_dir).structure.shapes
    deltas = {name: delta_of("Dense", shapes[name], seed) for seed, name in enumerate(LLAMA[:2])}
    deltas[LLAMA[2]] = delta_of("LowRank", shapes[LLAMA[2]], 1)
    expert = store(tmp_path / "one", tiny_llama_dir, deltas)
    written = export(expert.path, tmp_path / "adapter", LoraFormat(rank=4))
    lost = energy = 0.0
    for name, delta in deltas.items():
        values = numpy.linalg.svd(delta.dense().double().numpy(), compute_uv=False) ** 2
        lost, energy = lost + values[4:].sum(), energy + values.sum()
        assert written.weights[name].relative_error == pytest.approx((values[4:].sum() / values.sum()) ** 0.5, abs=1e-6)
    assert written.weights[LLAMA[2]].relative_error == 0.0
    assert written.weights[LLAMA[2]].delta.rank == 2
    assert written.relative_error == pytest.approx((lost / energy) ** 0.5, abs=1e-6)
    carried = dict(read_peft(tmp_path / "adapter").deltas)
    prompts = (torch.arange(48).view(2, 24) * 7919 + 11) % 99
    apart = expected_logits(tiny_llama_dir, carried, prompts) - expected_logits(tiny_llama_dir, deltas, prompts)
    assert written.check.largest_difference < 1e-5 < 0.05 < written.check.largest_approximation
    assert written.check.largest_approximation == pytest.approx(apart.abs().max().item(), rel=1e-3)
    assert written.check.mean_approximation == pytest.approx(apart.abs().mean().item(), rel=1e-3)
    manifest = json.loads((tmp_path / "adapter/modular_experts.json").read_text())
    assert manifest["adapter"]["relative_error"] == written.relative_error
    assert manifest["adapter"]["weights"][LLAMA[2]]["kept"] == 2


def test_a_delta_that_is_dense_in_form_only_is_written_as_single_entries(tiny_llama_dir, tmp_path):
    sparse = delta_of("Sparse", Base.open(tiny_llama_dir).structure.shapes[LLAMA[0]], 1)
    expert = store(tmp_path / "one", tiny_llama_dir, {LLAMA[0]: Dense(sparse.dense())})
    encoded = export(expert.path, tmp_path / "adapter", SupertuningFormat()).weights[LLAMA[0]]
    assert torch.equal(encoded.delta.dense(), sparse.dense())


REFUSED = {
    "norms and biases": ("Dense", [f"{LAYER}.input_layernorm.weight", LLAMA[0]], LoraFormat(rank=2),
                         r"can only move the weight of a Linear, Conv1D and Embedding, and one also "
                         r"moves model.layers.0.input_layernorm.weight; .* with `apply`"),
    "embeddings in a sparse adapter": ("Sparse", ["model.embed_tokens.weight"], SupertuningFormat(),
                                       r"a SUPERTUNING adapter can only move the weight of a Linear"),
    "dense as super-tuning": ("Dense", LLAMA, SupertuningFormat(), r"export it with `form=lora` and `rank=16`"),
    "low-rank as super-tuning": ("LowRank", LLAMA, SupertuningFormat(), r"to store; export it with `form=lora`$"),
    "sparse as lora": ("Sparse", LLAMA, LoraFormat(), r"is Sparse, not a product of two factors; give a `rank=16`"),
    "too many entries for shira": ("Sparse", None, ShiraFormat(), r"SHiRA would need r=11 .* 528 entries .* only 512"),
}  # fmt: skip


def test_what_an_adapter_cannot_store_is_refused_with_the_way_out(tiny_llama_dir, tmp_path):
    for number, (form, names, kind, sentence) in enumerate(REFUSED.values()):
        place = tmp_path / str(number) / "one"
        if names is None:
            full = Sparse(torch.arange(512, dtype=torch.int32), torch.ones(512), torch.Size((16, 32)))
            store(place, tiny_llama_dir, {f"{LAYER}.self_attn.k_proj.weight": full})
        elif "layernorm" in names[0]:
            deltas = [Dense(torch.ones(32)), Dense(torch.ones(32, 32))]
            store(place, tiny_llama_dir, dict(zip(names, deltas, strict=True)))
        else:
            make_expert(place, tiny_llama_dir, names, form)
        with pytest.raises(ValueError, match=sentence):
            export(place, place.parent / "adapter", kind)
        assert sorted(path.name for path in place.parent.iterdir()) == ["one"]


def test_an_adapter_that_computes_something_else_is_not_written(tiny_llama_dir, tmp_path, monkeypatch):
    load, expert = PeftModel.from_pretrained, make_expert(tmp_path / "one", tiny_llama_dir, LLAMA)
    for shift in (0.01, float("nan")):

        def load_another(*arguments, shift=shift):
            model = load(*arguments)
            with torch.no_grad():
                model.get_base_model().model.norm.weight.add_(shift)
            return model

        monkeypatch.setattr(PeftModel, "from_pretrained", load_another)
        with pytest.raises(ValueError, match=r"adapter was not written: loaded again with peft 0.21.2, its logits"):
            export(expert.path, tmp_path / "adapter", LoraFormat())
        assert sorted(path.name for path in tmp_path.iterdir()) == ["one"]


MIXTURES = [("mixtral", {"all-linear": 2}), ("gpt_oss", {"all-linear": 2}), ("gpt_oss", {"gate_up_proj[1]": 3})]


@pytest.mark.parametrize(("kind", "ranks"), MIXTURES)
def test_matrices_of_a_mixture_of_experts_go_to_peft_and_back(kind, ranks, tmp_path) -> None:
    """They become PEFT's `target_parameters`; the first base stores `(out, in)`, the other `(in, out)`."""
    mixture(kind).save_pretrained(tmp_path / "base")
    model = Base.open(tmp_path / "base").load()
    inject(model, {pattern: partial(LoRAExpert, rank=rank) for pattern, rank in ranks.items()})
    for _, layer in expert_layers(model):
        torch.nn.init.normal_(layer.expert.up)
    expert = save_expert(model, tmp_path / "library/one")
    written = export(expert.path, tmp_path / "adapter")
    assert written.relative_error < 1e-6
    expected = expected_logits(tmp_path / "base", dict(expert))
    torch.testing.assert_close(peft_logits(tmp_path / "base", tmp_path / "adapter"), expected, rtol=0, atol=1e-4)
    back = dict(read_peft(tmp_path / "adapter").deltas)
    assert back.keys() == set(expert)
    for name, delta in expert.items():
        assert isinstance(back[name], LowRank)
        torch.testing.assert_close(back[name].dense(), delta.dense(), rtol=1e-4, atol=1e-5)
