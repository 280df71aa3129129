"""Injection by class swap: exact at the start and after eject on every named architecture, and careful about
targets.
"""

from collections.abc import Callable, Sequence
from functools import partial

import conftest
import pytest
import torch
from testbed.other_experts import BiasExpert, GatedExpert
from testbed.runs import take_steps
from torch import nn

from modular_experts.experts import Expert, FullExpert, LoRAExpert, MaskedExpert, SparseExpert
from modular_experts.experts.site import Site
from modular_experts.injection import (
    eject,
    expert_layers,
    expert_state,
    find_sites,
    inject,
    load_expert_state,
    task_vector,
)

KINDS = {
    "element": partial(SparseExpert, keep_ratio=0.1),
    "block": partial(SparseExpert, keep_ratio=0.4, granularity="block", block_size=8),
    "masked": partial(MaskedExpert, keep_ratio=0.2, dense_start=False),
    "lora": partial(LoRAExpert, rank=2),
    "full": FullExpert,
}
IDS = torch.arange(30).view(2, 15) + 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", conftest.ARCHITECTURES)
def test_export_then_apply_reproduces_the_trained_logits_and_eject_the_base(architecture: str, kind: str) -> None:
    model, plain = conftest.build_model(architecture), conftest.build_model(architecture)
    base = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    inject(model, KINDS[kind], conftest.TARGETS[architecture])
    exact = torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    assert exact or architecture == "gpt2"  # whose transposed weight is multiplied in another order
    torch.testing.assert_close(model(input_ids=IDS).logits, plain(input_ids=IDS).logits, rtol=1e-6, atol=1e-6)
    take_steps(model, IDS)
    trained = model(input_ids=IDS).logits
    assert (trained - plain(input_ids=IDS).logits).abs().max() > 1e-3
    with torch.no_grad():
        for name, delta in task_vector(model, base.__getitem__):
            delta.add_to(plain.get_parameter(name))
    torch.testing.assert_close(plain(input_ids=IDS).logits, trained, rtol=1e-5, atol=1e-5)
    eject(model, base.__getitem__)
    after = model.state_dict()
    assert after.keys() == base.keys()
    assert all(torch.equal(after[name], base[name]) for name in base)
    assert not any(isinstance(module, Expert) for module in model.modules())


def _kinds(model: nn.Module) -> dict[str, str]:
    return {name: type(layer.expert).__name__ for name, layer in expert_layers(model)}


@pytest.mark.parametrize("pattern", ["q_proj|v_proj", "(q|v)_proj", r".*\.[qv]_proj", ["q_proj", "self_attn.v_proj"]])
def test_ends_of_names_and_full_names_find_the_same_layers(pattern: str | list[str]) -> None:
    names = inject(conftest.build_model("llama"), LoRAExpert, pattern)
    parts = [name.split(".")[2::2] for name in names]
    assert parts == [["0", "q_proj"], ["0", "v_proj"], ["1", "q_proj"], ["1", "v_proj"]]


@pytest.mark.parametrize("tied", [False, True])
def test_all_linear_leaves_out_the_head(tied: bool) -> None:
    model = conftest.build_model("llama", tie_word_embeddings=tied)
    keys = set(model.state_dict())
    names = inject(model, LoRAExpert, "all-linear")
    assert keys <= set(model.state_dict())
    assert isinstance(model.model.layers[0].self_attn.q_proj, nn.Linear)
    assert len(names) == 2 * 7
    assert "lm_head.weight" not in names
    assert len(inject(nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9)), LoRAExpert, "all-linear")) == 2


def test_of_several_patterns_the_first_that_matches_decides() -> None:
    model = conftest.build_model("llama")
    inject(model, {"layers.0.self_attn.q_proj": KINDS["block"], "q_proj": KINDS["lora"], "(q|v)_proj": FullExpert})
    assert list(_kinds(model).values()) == ["SparseExpert", "FullExpert", "LoRAExpert", "FullExpert"]


def test_a_plan_sees_the_sites_and_names_or_returns_them() -> None:
    seen: list[Site] = []

    def deeper(sites: Sequence[Site]) -> dict[Site | str, Callable[..., Expert]]:
        seen.extend(sites)
        ranks = {site: partial(LoRAExpert, rank=1 + site.depth) for site in sites if site.layer == "q_proj"}
        return {**ranks, "lm_head": FullExpert}

    model = conftest.build_model("llama")
    inject(model, deeper)
    assert {site.name: site.module for site in seen} == {
        n: m for n, m in model.named_modules() if hasattr(m, "in_features")
    }
    assert {(site.depth, site.by_name_only) for site in seen} == {(0, False), (1, False), (None, True)}
    assert [layer.expert.rank for name, layer in expert_layers(model) if "q_proj" in name] == [1, 2]
    assert "lm_head.weight" in _kinds(model)


def test_a_factory_with_a_second_parameter_gets_the_site() -> None:
    class Deeper(LoRAExpert):
        def __init__(self, weight: torch.Tensor, rank: int = 1, site: Site | None = None) -> None:
            super().__init__(weight, rank + (site.depth if site else 5))

    for factory in (Deeper, partial(Deeper, rank=1), lambda weight, where: LoRAExpert(weight, 1 + where.depth)):
        model = conftest.build_model("llama")
        inject(model, factory, "q_proj")
        assert [layer.expert.rank for _, layer in expert_layers(model)] == [1, 2]
    model = conftest.build_model("llama")
    inject(model, lambda weight, rank=3: LoRAExpert(weight, rank), "q_proj")
    assert [layer.expert.rank for _, layer in expert_layers(model)] == [3, 3]


def test_layers_inside_of_an_expert_are_no_sites() -> None:
    model = conftest.build_model("llama")
    inject(model, GatedExpert, "q_proj")
    assert not any(".expert" in site.name for site in find_sites(model))
    assert inject(model, LoRAExpert, ".*q_proj.*") == [name for name, _ in expert_layers(model)]
    assert set(_kinds(model).values()) == {"GatedExpert"}


@pytest.mark.parametrize(
    ("experts", "modules", "error", "sentence"),
    [
        (lambda sites: {"q_prj": FullExpert, "lm_head": FullExpert}, None, ValueError, "not a linear layer"),
        (lambda sites: {"lm_haed": FullExpert}, None, ValueError, "did you mean lm_head"),
        (lambda sites: ["lm_head"], None, TypeError, r"returned a list; it must return \{site: factory\}"),
        (LoRAExpert, None, ValueError, "modules is missing: name the layers"),
        (partial(LoRAExpert, rank=2), None, ValueError, "modules is missing"),
        ({"q_proj": LoRAExpert, "query": LoRAExpert}, None, ValueError, "experts='query' matches no linear layer"),
        (lambda weight: nn.Linear(2, 2), "q_proj", TypeError, r"must make a modular_experts\.Expert"),
        (BiasExpert, "q_proj", ValueError, "q_proj has no bias, and BiasExpert moves one; leave this layer out"),
        (
            LoRAExpert,
            r".*query",
            ValueError,
            r"'\.\*query' matches no linear layer of the model.*end in down_proj.*as in lm_head$",
        ),
        (LoRAExpert, r".*q_porj", ValueError, "did you mean q_proj"),
        (LoRAExpert, [r".*q_proj", r".*nothing"], ValueError, r"modules='\.\*nothing'"),
        (LoRAExpert, "0.q_proj", ValueError, "modules='0.q_proj' matches no linear layer"),
        (LoRAExpert, "proj", ValueError, "modules='proj' matches no linear layer"),
        (LoRAExpert, "(", ValueError, "is not a regular expression"),
    ],
)
def test_a_plan_an_expert_or_a_pattern_that_does_not_fit_is_refused(experts, modules, error, sentence) -> None:
    with pytest.raises(error, match=sentence):
        inject(conftest.build_model("llama"), experts, modules)


def test_a_state_goes_only_into_the_experts_that_it_came_from() -> None:
    model, other = conftest.build_model("llama"), conftest.build_model("llama")
    inject(model, GatedExpert, "q_proj")
    inject(other, GatedExpert, "layers.0.self_attn.q_proj")
    with pytest.raises(ValueError, match=r"the state but not the model has an expert with a state for .*1.*q_proj"):
        load_expert_state(other, expert_state(model))
    with pytest.raises(ValueError, match=r"the model but not the state has an expert"):
        load_expert_state(model, expert_state(other))


def test_a_tied_or_a_quantised_weight_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lm_head\.weight is the same tensor as .*embed_tokens\.weight \(tied\)"):
        inject(conftest.build_model("llama", tie_word_embeddings=True), LoRAExpert, ".*")

    class Quantised(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input)

    model = nn.Sequential(nn.Linear(4, 4))
    model[0].__class__ = Quantised
    with pytest.raises(ValueError, match="matches 0, whose weight is quantised"):
        inject(model, LoRAExpert, "0")


def test_ejecting_a_full_expert_needs_the_base() -> None:
    model = conftest.build_model("llama")
    inject(model, FullExpert, r".*\.q_proj")
    with pytest.raises(ValueError, match="needs the base"):
        eject(model)
