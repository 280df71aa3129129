"""RECAST against the singular values of the stack of weights, and what its library and merges keep."""

import pickle

import pytest
import torch
from conftest import build_model
from testbed import runs
from testbed.systems import filled

from modular_experts.base import Base
from modular_experts.base.apply import applied, apply_deltas
from modular_experts.deltas import Dense
from modular_experts.experts import LoRAExpert
from modular_experts.injection import expert_layers, expert_state, inject, load_expert_state
from modular_experts.injection.attach import attached
from modular_experts.injection.save import save_expert
from modular_experts.library import open_expert
from modular_experts.systems.recast import RecastExpert, TemplateBanks
from modular_experts.testing import check_expert, check_plan
from modular_experts.training.export_expert import ExportExpert

IDS = torch.arange(30).view(2, 15) + 3
BANKS = {"experts": TemplateBanks()}


def made(architecture: str = "llama", layers: int = 4, **settings) -> torch.nn.Module:
    """Return a float64 model with the experts of a plan."""
    depth = {"n_layer": layers} if architecture == "gpt2" else {"num_hidden_layers": layers}
    model = build_model(architecture, **depth).double()
    inject(model, TemplateBanks(**settings))
    return model


def test_the_expert_and_the_plan_keep_their_contracts() -> None:
    check_expert(lambda weight, site: RecastExpert(weight, [site.module], torch.ones(1, 1)), compile=False)
    check_plan(TemplateBanks(), compile=False)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize(("group", "templates"), [(4, 1), (4, 3), (4, 4), (3, 2)])
def test_templates_miss_what_the_dropped_singular_values_hold(architecture, group, templates) -> None:
    """Groups of blocks 0 to 3 by depth; the rest of a division is a group of its own."""
    model = made(architecture, modules="all-linear", group=group, templates=templates)
    kinds: dict[str, list] = {}
    for name, layer in sorted(expert_layers(model)):
        kinds.setdefault(name.partition(".layers." if architecture == "llama" else ".h.")[2][1:], []).append(layer)
    assert len(kinds) == (7 if architecture == "llama" else 4)
    for alike in kinds.values():
        for together in (alike[:group], alike[group:]):
            if not together:
                continue
            stack = torch.stack([layer.matrix.flatten() for layer in together])
            mixing = together[0].expert.mixing
            assert mixing.shape == (min(templates, len(together)), len(together))
            missed = stack - mixing.T @ (mixing @ stack)
            dropped = torch.linalg.svdvals(stack)[templates:]
            assert missed.norm().item() == pytest.approx(dropped.square().sum().sqrt().item(), rel=1e-9, abs=1e-12)
            if templates >= len(together):
                assert missed.norm() < 1e-12 * stack.norm()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_delta_is_the_sum_of_templates_made_by_a_singular_value_decomposition(architecture) -> None:
    model = filled(made(architecture, modules=r".*\.(o_proj|c_attn)", group=4, templates=2))
    layers = [layer for _, layer in expert_layers(model)]
    stack = torch.stack([layer.matrix.flatten() for layer in layers])
    left, values, right = torch.linalg.svd(stack, full_matrices=False)
    templates = values[:2, None] * right[:2]
    for layer in layers:
        # A singular vector is known but for its sign.
        signs = (layer.expert.mixing * left[:, :2].T).sum(1).sign()
        wanted = (layer.expert.change * signs) @ templates
        found = layer.expert.delta(layer.matrix, lambda: None)
        assert isinstance(found, Dense)
        torch.testing.assert_close(found.values.flatten(), wanted, rtol=1e-10, atol=1e-12)


def test_blocks_stand_in_the_order_of_their_numbers() -> None:
    model = made(layers=12, modules="q_proj", group=3, templates=1)
    experts = {name: layer.expert for name, layer in expert_layers(model)}
    for name, expert in experts.items():
        first = int(name.split(".")[2]) // 3 * 3
        own = [model.model.layers[depth].self_attn.q_proj for depth in range(first, first + 3)]
        assert all(one is other for one, other in zip(expert._layers, own, strict=True)), name


def test_tasks_share_the_weights_of_the_model_and_own_a_few_numbers() -> None:
    model = made(modules="all-linear")
    weights = {name: parameter.data_ptr() for name, parameter in model.named_parameters() if ".expert." not in name}
    numbers = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert numbers == 4 * 7 * 2
    assert sum(tensor.numel() for tensor in expert_state(model).values()) == numbers + 4 * 7 * 2 * 2
    for name, layer in expert_layers(model):
        read = {one.matrix.data_ptr() for one in layer.expert._layers}
        assert layer.matrix.data_ptr() in read, name
        assert read <= set(weights.values())


def test_experts_of_a_library_share_one_bank_which_is_their_base(tiny_llama_dir, task_files, tmp_path) -> None:
    """The fingerprint of the base in their records is the content hash of the bank; no file holds a template."""
    opened = []
    for name in ("upper", "reverse"):
        export = ExportExpert(str(tmp_path / "library"), name, monitor=None)
        runs.fit(tiny_llama_dir, {name: task_files[name]}, tmp_path / name, None, export, own=BANKS, max_steps=2)
        opened.append(open_expert(tmp_path / "library" / name))
    states = [expert.state() for expert in opened]
    assert len({expert.record["base"]["fingerprint"] for expert in opened}) == 1
    own, shared = ([name for name in states[0] if name.endswith(end)] for end in ("change", "mixing"))
    assert len(own) == len(shared) == len(states[0]) / 2 == 14
    assert all(torch.equal(states[1][name], states[0][name]) for name in shared)
    assert not any(torch.equal(states[1][name], states[0][name]) for name in own)
    # Two coefficients of a layer, and its two templates as sums of two layers.
    assert all(sum(tensor.numel() for tensor in state.values()) == 14 * (2 + 2 * 2) for state in states)


def test_a_state_means_the_same_whatever_basis_a_new_bank_has() -> None:
    """Another machine may turn singular vectors around."""
    first, second = filled(made(modules="q_proj", templates=1)), made(modules="q_proj", templates=1)
    for _, layer in expert_layers(second):
        layer.expert.mixing = -layer.expert.mixing
    load_expert_state(second, expert_state(first))
    assert torch.equal(second(IDS).logits, first(IDS).logits)
    assert torch.equal(pickle.loads(pickle.dumps(first))(IDS).logits, first(IDS).logits)


def test_on_top_of_others_the_state_needs_their_weights_and_the_stored_delta_does_not(tiny_llama_dir, tmp_path) -> None:
    library, opened = tmp_path / "library", Base.open(tiny_llama_dir)
    under = opened.load()
    inject(under, LoRAExpert, "all-linear")
    save_expert(filled(under, 0.1), library / "under", base=tiny_llama_dir)
    model = opened.load()
    apply_deltas(model, [open_expert(library / "under")])
    inject(model, TemplateBanks())
    filled(model.eval(), 0.3)
    save_expert(model, library / "top", base=tiny_llama_dir, applied=[library / "under"])
    wanted, fresh, both = model(IDS).logits, opened.load(), [library / "under", library / "top"]
    with attached(fresh, both):
        torch.testing.assert_close(fresh(IDS).logits, wanted)
    sentence = "top was trained on top of under, and its state .* leave as_trained out, .* or add them to the model"
    with pytest.raises(ValueError, match=sentence):
        attached(fresh, library / "top", as_trained=True)
    assert not list(expert_layers(fresh))
    with applied(fresh, library / "under"), attached(fresh, library / "top", check=False, as_trained=True):
        torch.testing.assert_close(fresh(IDS).logits, wanted)
    with applied(fresh, library / "top"):
        stored = fresh(IDS).logits
    with attached(fresh, library / "top", check=False, as_trained=True):
        assert (fresh(IDS).logits - stored).abs().max() > 1e-3, "the base alone has other templates"
