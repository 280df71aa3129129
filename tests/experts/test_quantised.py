"""Experts beside a quantised weight: the same numbers as over the dequantised weight, with nothing of it kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import conftest
import pytest
import torch
from testbed.quantised import TOKENS, load, plain_twin, put, step
from torch import Tensor, nn

from modular_experts.base import Base, structure
from modular_experts.base.quantised import read_weight
from modular_experts.deltas import Dense, Sparse
from modular_experts.experts import FullExpert, LoRAExpert, MaskedExpert, SparseExpert
from modular_experts.injection import eject, expert_layers, inject, task_vector
from modular_experts.injection.attach import attached
from modular_experts.injection.routed import routed
from modular_experts.library import make_record, write_expert
from modular_experts.native.transient import TransientWeight
from modular_experts.selection.choice import SupportChoice, selectable_layers
from modular_experts.selection.scoring import ScoringPass, choose_by_passes
from modular_experts.systems import glora, goat, recast, tt_lora

pytest.importorskip("bitsandbytes")

FORMS = ["nf4", "int8"]
KINDS: dict[str, Any] = {
    "entries": partial(SparseExpert, keep_ratio=0.1),
    "sampled": partial(SparseExpert, keep_ratio=0.1, backend="sampled"),
    "tiles": partial(SparseExpert, keep_ratio=0.25, granularity="block", block_size=4),
    "rows": partial(SparseExpert, keep_ratio=0.2, granularity="row"),
    "columns": partial(SparseExpert, keep_ratio=0.2, granularity="column"),
    "masked": partial(MaskedExpert, dense_start=False),
    "lora": partial(LoRAExpert, rank=3),
    "tensor train": partial(tt_lora.TTLoRAExpert, rank=2),
    "glora": glora.GLoRAExpert,
    "goat": partial(goat.GOATExpert, experts=2, rank=2, k=1),
}


@pytest.fixture(scope="module")
def llama(tiny: Callable[[str], Path]) -> Path:
    return tiny("llama")


# What a kind does with a weight does not depend on the form that the weight is read from.
@pytest.mark.parametrize(("kind", "form"), [*zip(KINDS, FORMS * 5, strict=True), ("entries", "int8"), ("lora", "int8")])
def test_gradients_are_those_over_the_dequantised_weight(kind: str, form: str, llama: Path) -> None:
    model = load(llama, form)
    twin = put(plain_twin(model), KINDS[kind])
    (loss, found), (expected_loss, expected) = step(put(model, KINDS[kind])), step(twin)
    assert loss == pytest.approx(expected_loss, abs=1e-6)
    assert found.keys() == expected.keys()
    assert len(found) >= 14
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= 1e-6 * max(1, expected[name].norm()), name


def test_a_plan_that_shares_what_it_owns_reads_quantised_layers(llama: Path) -> None:
    model = load(llama)
    twin = plain_twin(model)
    plan = recast.TemplateBanks(modules="q_proj", group=2, templates=1)
    for one in (model, twin):
        inject(one, plan)
    (loss, found), (expected_loss, expected) = step(model), step(twin)
    assert loss == pytest.approx(expected_loss, abs=1e-6)
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)


@contextmanager
def kept_bytes(model: nn.Module, sizes: list[int]) -> Iterator[None]:
    """Append the bytes that autograd keeps, each memory once, beside the parameters of the model."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, Any] = {}  # which hold the memory, so that no other gets its address

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
    sizes.append(sum(memory.nbytes() for memory in seen.values()))


@pytest.mark.parametrize("kind", ["entries", "tiles", "rows", "lora"])
def test_autograd_keeps_nothing_of_the_weight(kind: str, llama: Path) -> None:
    model = load(llama)
    twin = put(plain_twin(model), KINDS[kind])
    put(model, KINDS[kind])
    sizes: list[int] = []
    for one in (model, twin):
        with kept_bytes(one, sizes):
            one(TOKENS, labels=TOKENS).loss.backward()
    # The twin's own weights do not count; a quantised weight that autograd keeps has the memory of one number.
    assert sizes[0] <= sizes[1] + 8 * len(list(expert_layers(model)))


@pytest.mark.parametrize(("kind", "form"), [*zip(["entries", "tiles", "lora", "entries"], FORMS * 2, strict=True)])
def test_training_leaves_the_bytes_of_the_base_and_eject_gives_it_back(kind: str, form: str, llama: Path) -> None:
    model = load(llama, form)
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    logits = model(TOKENS).logits
    put(model, KINDS[kind])
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.01)
    losses = []
    for _ in range(5):
        losses.append(step(model)[0])
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    eject(model)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(model(TOKENS).logits, logits)


def test_measuring_a_base_leaves_its_weights(llama: Path) -> None:
    # bitsandbytes repacks a layer that computes without gradients on some CPUs, and rounds its scales.
    model = load(llama, "nf4", "bfloat16")
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    with torch.no_grad():
        model.eval()(TOKENS)
    assert all(torch.equal(one, before[name]) for name, one in model.named_parameters())


def test_bitsandbytes_warns_of_nothing(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    structure._computes_linear.cache_clear()  # which an earlier test may have filled
    put(load(llama), KINDS["lora"], "q_proj")
    assert not [record for record in caplog.records if record.name.startswith("bitsandbytes")]


def test_supports_are_chosen_alike_over_the_dequantised_weight(llama: Path) -> None:
    model = load(llama)
    twin, chosen = plain_twin(model), []
    for one in (put(model, KINDS["entries"]), put(twin, KINDS["entries"])):
        layers = selectable_layers(one)
        choice = SupportChoice(layers, 0, (2, 2))
        choose_by_passes(choice, lambda one=one: ScoringPass(lambda batch: one(batch, labels=batch).loss, [TOKENS]))
        for name, layer in layers.items():
            layer.expert.reselect(layer.matrix, choice.chosen[name])
        chosen.append(choice.chosen)
        # Values that were carried over, and new ones, give the same loss.
        chosen.append({"loss": step(one)[0]})
    assert all(torch.equal(chosen[0][name], chosen[2][name]) for name in chosen[0])
    assert chosen[1]["loss"] == pytest.approx(chosen[3]["loss"], abs=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_deltas_stand_beside_a_quantised_weight(architecture: str, tiny: Callable[[str], Path]) -> None:
    modules = "q_proj" if architecture == "llama" else "c_attn"
    model = load(tiny(architecture))
    twin = put(copy.deepcopy(model), KINDS["entries"], modules)
    deltas, expected = dict(task_vector(twin)), twin(TOKENS).logits
    plain = conftest.build_model(architecture)
    assert all(deltas[name].shape == plain.get_parameter(name).shape for name in deltas)
    base = model(TOKENS).logits
    with attached(model, deltas, check=False):
        assert torch.allclose(model(TOKENS).logits, expected, atol=1e-5)
    with routed(model, [deltas, {name: 2 * delta for name, delta in deltas.items()}], rows=[0, -1]):
        both = model(TOKENS).logits
    assert torch.allclose(both[0], expected[0], atol=1e-5)
    assert torch.allclose(both[1], base[1], atol=1e-5)
    assert torch.equal(model(TOKENS).logits, base)


def test_an_expert_of_a_bias_is_added_to_a_quantised_layer(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    place, name = tiny("qwen2"), "model.layers.0.self_attn.q_proj.bias"
    model = load(place)
    twin = plain_twin(model)
    delta = torch.linspace(-1, 1, len(twin.get_parameter(name)))
    write_expert(tmp_path / "expert", {name: Dense(delta)}, make_record("FullExpert", Base.open(place).facts))
    twin.get_parameter(name).data += delta
    with attached(model, tmp_path / "expert"):
        assert torch.allclose(model(TOKENS).logits, twin(TOKENS).logits, atol=1e-5)


def test_what_writes_into_a_quantised_weight_and_a_form_that_rounds_activations_are_refused(llama: Path) -> None:
    model = load(llama)
    with pytest.raises(ValueError, match=r"FullExpert writes what it trains into the weight, and .* is quantised"):
        inject(model, FullExpert, "q_proj")
    weight = read_weight(model.model.layers[0].self_attn.q_proj)
    for write in (lambda: weight.zero_(), lambda: weight.__setitem__(0, 1.0), lambda: weight.copy_(weight + 1)):
        with pytest.raises(TypeError, match="would write into a weight that is made anew"):
            write()
    model.model.layers[0].self_attn.q_proj.weight.act_quant_kwargs = {}
    with pytest.raises(ValueError, match="q_proj, whose quantised form also rounds the activations"):
        inject(model, LoRAExpert, r".*layers\.0\..*q_proj")


@pytest.mark.parametrize("form", ["int8-torchao", "float8-torchao", "intx-torchao"])
def test_forms_of_torchao_train_like_their_dequantised_weight(form: str, llama: Path) -> None:
    pytest.importorskip("torchao")
    model = load(llama, form)
    # torchao copies no weight of its own by deepcopy, so the twin is loaded.
    twin = put(plain_twin(load(llama, form)), KINDS["entries"])
    (loss, found), (expected_loss, expected) = step(put(model, KINDS["entries"])), step(twin)
    assert loss == pytest.approx(expected_loss, abs=1e-6)
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)


def test_a_source_has_the_weights_shape_and_no_memory_of_it() -> None:
    values = torch.arange(12.0).view(3, 4)
    weight = TransientWeight.of(values.clone, values.shape, torch.float32, torch.device("cpu"))
    assert (weight.shape, weight.dtype, len(weight), weight.untyped_storage().nbytes()) == ((3, 4), torch.float32, 3, 4)
    assert torch.equal(weight + 0, values)
    assert torch.equal(weight.T, values.T)
    assert weight.to(torch.bfloat16).dtype == torch.bfloat16
    moved = weight.plus(Sparse(torch.tensor([1, 11]), torch.tensor([5.0, 7.0]), values.shape))
    assert torch.equal((moved - weight).nonzero(), torch.tensor([[0, 1], [2, 3]]))
    assert torch.equal(values, torch.arange(12.0).view(3, 4))


@pytest.mark.parametrize("kind", ["entries", "lora"])
def test_autocast_and_checkpointing_compute_the_same(kind: str, llama: Path) -> None:
    model = load(llama, "nf4", "bfloat16")
    put(model, KINDS[kind]).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss, found = step(model)
    kept = {name: gradient.clone() for name, gradient in found.items()}
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": False})
    with torch.autocast("cpu", torch.bfloat16):
        again, found = step(model)
    assert again == loss
    assert all(torch.equal(found[name], kept[name]) for name in kept)
