"""Arrow and Energy: exact directions of any delta, and PEFT's own results where it is given PEFT's."""

from pathlib import Path

import peft
import pytest
import torch
from conftest import build_model
from peft.tuners.lora import ArrowConfig, create_arrow_model
from test_routed import FORMS, delta, experts_of
from testbed.peft_adapters import PEFT_WARNINGS, logits, save_adapter
from transformers import AutoModelForCausalLM

from modular_experts.deltas import Dense, Sparse
from modular_experts.deltas.algebra import top_direction
from modular_experts.injection.routed import by_weight, routed
from modular_experts.interop.peft import read_peft
from modular_experts.routing import Arrow, Energy, Softmax, TopK

COUNT = 4


def rotations(size: int) -> list[torch.Tensor]:
    """Return two random orthogonal matrices."""
    made = torch.Generator().manual_seed(0)
    return [torch.linalg.qr(torch.randn(size, size, generator=made, dtype=torch.float64)).Q for _ in range(2)]


def test_close_singular_values_and_none_at_all_have_a_top_direction() -> None:
    left, right = rotations(40)
    values = torch.ones(40, dtype=torch.float64) - 1e-5 * torch.arange(40)
    found, value = top_direction(Dense(left * values @ right))
    assert abs(found @ right[0]).item() == pytest.approx(1, abs=1e-9)
    assert value == pytest.approx(1, abs=1e-12)
    still, nothing = top_direction(Sparse.zero((3, 5)))
    assert (still.tolist(), nothing) == ([0.0] * 5, 0.0)


@pytest.mark.parametrize("values", [0.8 ** torch.arange(60), 1 - 0.002 * torch.arange(60)], ids=["clear", "close"])
def test_a_top_direction_needs_no_decomposition(values: torch.Tensor, monkeypatch) -> None:
    left, right = rotations(60)
    one = Dense(left * values @ right)
    monkeypatch.setattr(torch.linalg, "svd", None)
    found, value = top_direction(one)
    assert abs(found @ right[0]).item() == pytest.approx(1, abs=1e-12)
    assert value == pytest.approx(1, abs=1e-12)


DELTAS = [delta(form, torch.Size((12, 16)), seed) for seed, form in enumerate(FORMS)]
INPUTS = torch.randn(7, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("unit_inputs", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_scores_are_products_with_the_first_singular_vectors(unit_inputs: bool, scaled: bool) -> None:
    router, x = Arrow(unit_inputs, scaled), INPUTS
    router.learn([*DELTAS[:2], None, *DELTAS[2:]], [])
    wanted = []
    for one in DELTAS:
        _, values, right = torch.linalg.svd(one.dense())
        score = (x @ right[0]).abs() * (values[0] if scaled else 1)
        wanted.append(score / x.norm(dim=1) if unit_inputs else score)
    wanted.insert(2, torch.zeros(7).double())
    torch.testing.assert_close(router.scores(x), torch.stack(wanted, 1), rtol=1e-6, atol=1e-6)


def test_energy_is_the_length_of_what_an_expert_adds_for_its_size() -> None:
    router = Energy()
    router.learn([*DELTAS, None], [])
    wanted = [*[(INPUTS @ one.dense().T).norm(dim=1) / one.dense().norm() for one in DELTAS], torch.zeros(7).double()]
    torch.testing.assert_close(router.scores(INPUTS), torch.stack(wanted, 1), rtol=1e-6, atol=0)


def test_a_mixture_behind_arrow_is_the_sum_by_hand() -> None:
    """In GPT-2, whose layers store `(in, out)`."""
    model, select = build_model("gpt2").double(), Softmax(0.5)
    experts = experts_of(model)
    name = next(iter(experts[0]))
    experts = [{name: expert[name]} for expert in experts]
    seen: list[torch.Tensor] = []
    layer = model.get_submodule(name.removesuffix(".weight"))
    handle = layer.register_forward_hook(lambda _, x, out: seen.extend([x[0].flatten(0, 1), out.flatten(0, 1)]))
    tokens = 3 + torch.arange(40).view(2, 20)
    with torch.no_grad():
        with routed(model, experts, Arrow(select=select)):
            model(input_ids=tokens)
        model(input_ids=tokens)
    handle.remove()
    dense = [expert[name].dense().T for expert in experts]
    x, out, _, base = seen
    gates = select(torch.stack([(x @ torch.linalg.svd(one)[2][0]).abs() for one in dense], 1))
    added = torch.einsum("te,eoi,ti->to", gates.dense(3), torch.stack(dense), x)
    torch.testing.assert_close(out, base + added, rtol=1e-5, atol=1e-6)


def by_peft(base: Path, adapters: list[Path]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the logits of PEFT's Arrow among adapters, and the prototypes that it found, by weight."""
    places = [str(place) for place in adapters]
    settings = ArrowConfig(top_k=2, router_temperature=0.7, rng_seed=3)
    model = create_arrow_model(AutoModelForCausalLM.from_pretrained(base), places, settings)
    found, prototypes = logits(model), {}
    for name, layer in model.named_modules():
        if name.endswith("lora_arrow.arrow_router"):
            weight = name.removeprefix("base_model.model.").replace("lora_arrow.arrow_router", "weight")
            prototypes[weight] = layer.prototypes
    return found, prototypes


@pytest.mark.filterwarnings(*PEFT_WARNINGS)
@pytest.mark.parametrize("rank", [1, 3])
def test_with_the_prototypes_of_peft_it_is_the_arrow_of_peft(tiny_llama_dir, tmp_path, rank) -> None:
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "down_proj"])
    adapters = [save_adapter(tiny_llama_dir, tmp_path / f"{n}", config, n, spread=0.2) for n in range(COUNT)]
    wanted, prototypes = by_peft(tiny_llama_dir, adapters)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir).eval()
    experts = [dict(read_peft(place, tiny_llama_dir).deltas) for place in adapters]
    router = Arrow(select=TopK(2, temperature=0.7))
    assert (wanted - logits(model)).abs().max() > 0.02, "the adapters must move the logits"
    routers = by_weight(router, model, experts)
    assert routers.keys() == prototypes.keys()
    for name, one in routers.items():
        # PEFT's iteration finds the direction of a matrix of rank 1 in one step; for other matrices it stops before.
        if rank > 1:
            one.load_state({"prototypes": prototypes[name]}, COUNT)
    with routed(model, experts, routers):
        torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-6)
