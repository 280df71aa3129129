"""Stored experts in few bits behind a router: what they do, what they hold, and when they are decoded."""

import copy
import pickle
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import build_model
from test_routed import FORMS, delta
from torch import nn

from modular_experts.injection import expert_layers, find_sites
from modular_experts.injection.routed import routed
from modular_experts.library import StoredExpert, make_record, open_expert, write_expert
from modular_experts.library.packing import PackedDelta
from modular_experts.routing import Arrow
from modular_experts.routing.gates import Gates

RECORD = make_record("SparseExpert", {"id": "base", "fingerprint": "f"}, ["task"])
IDS = torch.arange(15).view(3, 5)


def _stored(folder: Path, model: nn.Module, encoding: str, forms: list[str] = FORMS) -> list[StoredExpert]:
    sites = [site for site in find_sites(model) if not site.by_name_only]
    for n in range(3):
        deltas = {s.weight: delta(forms[(n + i) % len(forms)], s.module.weight.shape, i) for i, s in enumerate(sites)}
        write_expert(folder / str(n), deltas, RECORD, encoding=encoding)
    return [open_expert(folder / str(n)) for n in range(3)]


def _held(model: nn.Module) -> int:
    return sum(one.nbytes for _, layer in expert_layers(model) for one in layer.expert.deltas if one is not None)


def _stored_bytes(experts: list[StoredExpert]) -> int:
    return sum(sum(expert.stored_bytes().values()) for expert in experts)


@pytest.fixture
def in_int4(tmp_path) -> tuple[nn.Module, list[StoredExpert]]:
    """A model, and experts of all forms in four bits."""
    model = build_model("llama")
    return model, _stored(tmp_path, model, "int4")


@pytest.fixture
def decoded(monkeypatch) -> Counter[str]:
    """How often each form has been decoded."""
    found: Counter[str] = Counter()
    decode = PackedDelta.delta

    def count(self: PackedDelta):
        found[self.stored.form] += 1
        return decode(self)

    monkeypatch.setattr(PackedDelta, "delta", count)
    return found


@pytest.mark.parametrize(("architecture", "encoding"), [("llama", "int4"), ("gpt2", "sign"), ("llama", "magnitudes2")])
def test_encoded_experts_act_as_what_they_stand_for(architecture, encoding, tmp_path) -> None:
    model = build_model(architecture)
    experts = _stored(tmp_path, model, encoding)
    with routed(model, [dict(expert) for expert in experts], rows=[2, 0, -1], check=False), torch.no_grad():
        wanted = model(input_ids=IDS).logits
    with routed(model, experts, rows=[2, 0, -1], check=False):
        assert torch.equal(model(input_ids=IDS).logits, wanted)
        with torch.no_grad():
            assert torch.equal(model(input_ids=IDS).logits, wanted)


def test_only_experts_in_use_are_held_decoded(in_int4) -> None:
    model, experts = in_int4
    with routed(model, experts, rows=[1, 1, 1], check=False) as inside, torch.no_grad():
        assert _held(model) == _stored_bytes(experts)
        held = []
        for numbers in ([1, 1, 1], [1, 2, 0], [1, 1, 1], [3, 3, 3]):
            inside.current.gates = Gates(torch.tensor(numbers)[:, None], torch.ones(3, 1))
            model(input_ids=IDS)
            held.append(_held(model))
        assert held[1] > held[0] == held[2] > held[3] == _stored_bytes(experts)


def test_an_expert_is_decoded_once_while_it_is_in_use(tmp_path, decoded) -> None:
    model = build_model("llama")
    experts = _stored(tmp_path, model, "int4", ["entries"])
    with routed(model, experts, rows=[0, 2, 0], check=False), torch.no_grad():
        assert not decoded
        for _ in range(3):
            model(input_ids=IDS)
    assert decoded == {"Sparse": 2 * len(experts[0])}


def test_a_trainer_may_validate_in_inference_mode_before_it_trains(in_int4) -> None:
    model, experts = in_int4
    with routed(model, experts, rows=[0, 1, 2], check=False) as inside:
        with torch.inference_mode():
            model(input_ids=IDS)
        inside.current.gates = Gates(torch.tensor([[0], [1], [2]]), torch.ones(3, 1))
        embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad is not None
    assert embedded.grad.any()


def test_values_of_16_and_32_bits_are_held_in_the_dtype_of_the_model(tmp_path, decoded) -> None:
    model, size = build_model("llama").bfloat16(), {}
    for encoding in ("float32", "bfloat16"):
        experts = _stored(tmp_path / encoding, model, encoding)
        with routed(model, experts, rows=[0, 1, 2], check=False), torch.no_grad():
            size[encoding] = _held(model)
            model(input_ids=IDS)
            assert _held(model) == size[encoding]
    assert size["float32"] == size["bfloat16"]
    assert not decoded


def test_a_router_of_each_weight_has_the_decoded_deltas(tmp_path) -> None:
    model = build_model("llama")
    experts = _stored(tmp_path, model, "int8", ["low rank"])
    with routed(model, [dict(expert) for expert in experts], Arrow(), check=False), torch.no_grad():
        wanted = model(input_ids=IDS).logits
    with routed(model, experts, Arrow(), check=False), torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, wanted)


def test_copies_and_casts_keep_encoded_experts(in_int4) -> None:
    model, experts = in_int4
    with routed(model, experts, rows=[0, 1, 2], check=False), torch.no_grad():
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        wanted = model(input_ids=IDS).logits
        for twin in twins:
            assert _held(twin) == _stored_bytes(experts)
            assert torch.equal(twin(input_ids=IDS).logits, wanted)
        model.double()
        assert _held(model) == _stored_bytes(experts)
        torch.testing.assert_close(model(input_ids=IDS).logits.float(), wanted, rtol=1e-4, atol=1e-4)
