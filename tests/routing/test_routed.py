"""Experts behind a router: every row gets its own expert, whatever the batch, the padding and the cache."""

import pytest
import torch
from conftest import ARCHITECTURES, build_model
from testbed.padded_rows import ROWS, padded
from testbed.routers import centroid

from modular_experts.base.apply import applied
from modular_experts.deltas import BlockSparse, Delta, Dense, LowRank, Sparse
from modular_experts.experts import LoRAExpert
from modular_experts.injection import find_sites, inject, named_experts
from modular_experts.injection.routed import Injected, routed
from modular_experts.routing import Centroid, TopK
from modular_experts.routing.gates import Gates, Softmax, Threshold, reading
from modular_experts.routing.prompts import prompt_vectors


def delta(form: str, shape: torch.Size, seed: int) -> Delta:
    made = torch.Generator().manual_seed(seed)
    dense = 0.3 * torch.randn(shape, generator=made, dtype=torch.float64)
    if form == "dense":
        return Dense(dense)
    if form == "low rank":
        return LowRank(dense[:, :2].contiguous(), dense[:2].contiguous())
    if form == "entries":
        indices = torch.randperm(dense.numel(), generator=made)[: dense.numel() // 5].sort().values.int()
        return Sparse(indices, dense.flatten()[indices], shape)
    return BlockSparse(torch.tensor([0, 2], dtype=torch.int32), dense[:8, :4].reshape(2, 4, 4).contiguous(), shape)


FORMS = ["dense", "low rank", "entries", "tiles"]


def experts_of(model: torch.nn.Module, count: int = 3, forms: list[str] = FORMS) -> list[dict[str, Delta]]:
    sites = [site for site in find_sites(model) if not site.by_name_only]
    return [
        {s.weight: delta(forms[(n + i) % len(forms)], s.module.weight.shape, 97 * n + i) for i, s in enumerate(sites)}
        for n in range(count)
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_row_has_the_logits_of_its_own_expert(architecture: str) -> None:
    model = build_model(architecture).double()
    experts, numbers = experts_of(model), [2, 0, -1, 2]
    batch = padded(ROWS, "right")
    with routed(model, experts, rows=numbers), torch.no_grad():
        found = model(**batch).logits
        # Eight tokens could be divided among four rows.
        with pytest.raises(ValueError, match="rows names the experts of 4 rows, and the batch has 2"):
            model(batch["input_ids"][:2, :4])
    for row, number in enumerate(numbers):
        with applied(model, [experts[number]] if number >= 0 else []), torch.no_grad():
            alone = model(input_ids=torch.tensor([ROWS[row]])).logits[0]
        torch.testing.assert_close(found[row, : len(ROWS[row])], alone, rtol=1e-9, atol=1e-9)


def test_the_model_is_the_base_again_afterwards_and_trains_what_it_trained() -> None:
    model = build_model("llama").train()
    model.lm_head.eval()
    model.get_parameter("model.norm.weight").requires_grad_(False)
    modes = [module.training for module in model.modules()]
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with routed(model, experts_of(model), rows=[0]):
        assert sorted(model.state_dict()) == sorted(before), "a mixture must add nothing to the base's own tensors"
        assert not model.training
    with pytest.raises(ZeroDivisionError):
        Injected(model, lambda sites: dict(zip(sites, [LoRAExpert, lambda weight: 1 / 0], strict=False)))
    assert sorted(model.state_dict()) == sorted(before)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not model._forward_pre_hooks
    assert [module.training for module in model.modules()] == modes
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trained


def test_a_model_with_experts_is_refused_and_keeps_them() -> None:
    model = build_model("llama")
    inject(model, LoRAExpert, "q_proj")
    for plan in (lambda sites: {}, lambda sites: 1 / 0):
        with pytest.raises(ValueError, match=r"the model has experts already; give it others after eject\(model\)"):
            Injected(model, plan)
    assert [name for name, _ in named_experts(model)] == [f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1)]


def test_constant_gates_are_the_weighted_sum_of_the_experts() -> None:
    model = build_model("llama").double()
    experts = experts_of(model)
    with routed(model, experts, rows=[0, 0, 0, 0]) as running, torch.no_grad():
        running.current.gates = Gates(torch.tensor([[0, 2]] * 4), torch.tensor([[0.25, -0.5]] * 4).double())
        found = model(**padded(ROWS, "right")).logits
    merged = {name: experts[0][name] * 0.25 + experts[2][name] * -0.5 for name in experts[0]}
    with applied(model, [merged]), torch.no_grad():
        wanted = model(**padded(ROWS, "right")).logits
    mask = padded(ROWS, "right")["attention_mask"].bool()
    torch.testing.assert_close(found[mask], wanted[mask], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("depths", [[0.0], [0.0, 0.5], [1.0]])
def test_neither_padding_nor_other_rows_change_a_gate(architecture: str, side: str, depths: list[float]) -> None:
    model = build_model(architecture).double()
    router = centroid(model, depths=depths, select=Softmax())
    with routed(model, experts_of(model), router) as running, torch.no_grad():
        model(**padded(ROWS, side))
        together = running.current.gates
        for number, row in enumerate(ROWS):
            model(input_ids=torch.tensor([row]))
            alone = running.current.gates
            torch.testing.assert_close(together.weights[number], alone.weights[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_answer_keeps_the_gates_of_its_prompt(architecture: str) -> None:
    model = build_model(architecture).double()
    router = centroid(model)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with routed(model, experts_of(model), router) as running, torch.no_grad():
        with_cache = model.generate(**padded(ROWS, "left"), **settings)
        gates = running.current.gates.ids.flatten().tolist()
        for number, row in enumerate(ROWS):
            # Without a cache each step reads all tokens again; their gate stays the prompt's.
            ids = torch.tensor([row])
            for _ in range(6):
                with reading(torch.arange(ids.shape[1])[None] < len(row)):
                    ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
            assert running.current.gates.ids.item() == gates[number]
            assert with_cache[number, -6:].tolist() == ids[0, -6:].tolist()
    assert len(set(gates)) > 1, "the test must route rows to different experts"


def test_a_centroid_is_linear_discriminant_analysis() -> None:
    made = torch.Generator().manual_seed(0)
    prompts = [torch.randn(9, 4, generator=made, dtype=torch.float64) + 2 * number for number in range(3)]
    router = Centroid(shrink=0.2, reject=None)
    router.learn([], [rows.float() for rows in prompts])
    around = torch.cat([rows - rows.mean(0) for rows in prompts])
    covariance = around.T @ around / (27 - 3)
    shrunk = 0.8 * covariance + 0.2 * covariance.diagonal().mean() * torch.eye(4).double()
    x = torch.randn(5, 4, generator=made, dtype=torch.float64)
    normal, zero = torch.distributions.MultivariateNormal, torch.zeros(4).double()
    wanted = [normal(rows.mean(0), shrunk).log_prob(x) - normal(zero, shrunk).log_prob(zero) for rows in prompts]
    torch.testing.assert_close(router.scores(x.float()).double(), torch.stack(wanted, 1), rtol=1e-4, atol=1e-4)


def test_prompts_far_from_all_means_go_to_the_fallback() -> None:
    made = torch.Generator().manual_seed(0)
    prompts = [torch.randn(200, 4, generator=made) + 6 * number for number in range(3)]
    router = Centroid(reject=0.05, select=TopK(2))
    router.learn([], prompts)
    fresh = [torch.randn(400, 4, generator=made) + 6 * number for number in range(3)]
    gates = router(torch.cat(fresh))
    rejected = (gates.ids == 3).any(1)
    assert 0.01 < rejected.float().mean() < 0.12, "about as many new prompts as own ones are rejected"
    assert gates.weights[rejected].tolist() == [[1.0, 0.0]] * int(rejected.sum())
    assert (router(torch.full((1, 4), 100.0)).ids[0, 0], router(fresh[1][:1]).ids[0, 0]) == (3, 1)


def test_selections() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, -5.0]])
    two = TopK(2)(scores)
    assert two.ids.tolist() == [[1, 2], [0, 1]], "of equal scores, the expert with the lower number comes first"
    torch.testing.assert_close(two.weights[0], torch.tensor([3.0, 2.0]).softmax(0))
    torch.testing.assert_close(Softmax(2.0)(scores).weights, (scores / 2).softmax(1))
    kept = Threshold(0.3)(scores).weights
    assert (kept > 0).tolist() == [[False, True, True], [True, True, False]]
    torch.testing.assert_close(kept.sum(1), torch.ones(2))
    with pytest.raises(ValueError, match="k=4 is more than the 3 experts"):
        TopK(4).check(3)


def test_what_cannot_be_routed_is_refused() -> None:
    model = build_model("llama")
    experts = experts_of(model)
    with pytest.raises(ValueError, match="either a router, or rows"):
        routed(model, experts)
    with pytest.raises(ValueError, match="must be numbers of the 3 experts"):
        routed(model, experts, rows=[3])
    norm = {"model.norm.weight": Dense(torch.ones(32))}
    with pytest.raises(ValueError, match=r"moves model\.norm\.weight, which is not a linear layer"):
        routed(model, [*experts, norm], rows=[0])
    smaller = {"model.layers.0.self_attn.q_proj.weight": Dense(torch.ones(16, 32))}
    with pytest.raises(ValueError, match=r"q_proj\.weight as a weight of shape \(16, 32\), and in .* \(32, 32\)"):
        routed(model, [*experts, smaller], rows=[0])
    with pytest.raises(ValueError, match="has learned 3 experts, and 2 are given"):
        routed(model, experts[:2], centroid(model))
    packed = torch.arange(5, 11)[None], torch.tensor([[0, 1, 2, 0, 1, 2]])
    whole = r"reads whole prompts, which it cannot in packed rows; leave data\.packing out"
    with routed(model, experts, centroid(model)), pytest.raises(ValueError, match=whole):
        model(input_ids=packed[0], position_ids=packed[1])
    with pytest.raises(ValueError, match="two different prompts among the 6"):
        Centroid(reject=None).learn([None] * 3, list(torch.eye(3)[:, None].expand(3, 2, 3)))


def test_few_prompts_do_not_make_a_router_reject_new_ones() -> None:
    made = torch.Generator().manual_seed(1)
    prompts = [torch.randn(12, 40, generator=made) + 3 * number for number in range(3)]
    router = Centroid(reject=0.0, shrink=0.05)
    router.learn([], prompts)
    fresh = torch.cat([torch.randn(100, 40, generator=made) + 3 * number for number in range(3)])
    assert (router(fresh).ids == 3).float().mean() < 0.1


def test_prompts_are_read_without_dropout_while_the_model_trains() -> None:
    model, ids = build_model("gpt2"), torch.arange(5, 15)[None]
    wanted = prompt_vectors(model, ids, None, [0.0, 1.0])
    model.train().get_submodule("transformer.drop").eval()
    modes, random = [module.training for module in model.modules()], torch.get_rng_state()
    found = prompt_vectors(model, ids, None, [0.0, 1.0])
    assert all(map(torch.equal, found, wanted))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)


def test_a_growing_answer_is_not_read_as_prompt_without_a_word() -> None:
    model, how = build_model("llama"), {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    batch = padded(ROWS, "left")
    with routed(model, experts_of(model), centroid(model, select=Softmax())), torch.no_grad():
        with pytest.raises(ValueError, match="would read the growing answer as prompt; generate with use_cache=True"):
            model.generate(**batch, **how, use_cache=False)
        # The next prompt is a prompt, and so is one that repeats the prompt before.
        for _ in range(2):
            model(**batch, use_cache=False)
        model.generate(**batch, **how)
