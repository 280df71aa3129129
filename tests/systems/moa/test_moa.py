"""MoA against its closed forms: gates, threshold, prompts, and what the library makes of it."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import ARCHITECTURES, build_model
from testbed.systems import filled
from torch import nn

from modular_experts.injection import eject, inject, named_experts
from modular_experts.systems.moa import MoA
from modular_experts.testing import check_plan

IDS = torch.arange(30).view(2, 15) + 3
FORMS = {
    "soft": {},
    "swiglu": {"router": "swiglu", "router_input": "residual"},
    "prompts": {"prompts": 3},
    "sparse": {"threshold": 0.8},
}


def made(settings: dict, architecture: str = "llama", fill: bool = True) -> nn.Module:
    """Return a float64 model with adapters whose parameters are random."""
    model = build_model(architecture).double()
    torch.manual_seed(0)
    inject(model, MoA(**({"rank": 2, "adapter_size": 3} | settings)))
    if fill:
        filled(model, 0.3)
    return model


def gates(model: nn.Module) -> list:
    return [expert for _, expert in named_experts(model) if type(expert).__name__ == "BlockGates"]


def set_gates(model: nn.Module, logit: float) -> None:
    """Give every gate a logit: 50 makes it 1 to the last bit of float64, and -50 closes it."""
    for one in gates(model):
        nn.init.zeros_(one.router.weight)
        nn.init.constant_(one.router.bias, logit)


@pytest.mark.parametrize("form", ["prompts", "sparse"])
def test_the_parts_keep_the_contract(form: str) -> None:
    check_plan(MoA(**({"rank": 2, "adapter_size": 3} | FORMS[form])), compile=False)


@pytest.mark.parametrize(("architecture", "form"), [*zip(ARCHITECTURES, ["soft", "sparse"] * 3, strict=True)])
def test_the_default_layers_are_there_in_each_architecture_and_start_at_the_base(architecture: str, form: str) -> None:
    base, model = build_model(architecture).double(), made(FORMS[form], architecture, fill=False)
    names = [name for name, _ in named_experts(model)]
    fused = {"llama": 5, "qwen2": 5, "qwen3": 5}.get(architecture, 3)
    assert len(names) == 2 * (fused + 2)
    with torch.no_grad():
        # GPT-2 adds its biases in another order.
        torch.testing.assert_close(model(IDS).logits, base(IDS).logits, rtol=0, atol=1e-14)
    filled(model, 0.3)
    with torch.no_grad():
        assert (model(IDS).logits - base(IDS).logits).abs().max() > 1e-3
    eject(model)
    assert torch.equal(model(IDS).logits, base(IDS).logits)


def test_gates_of_one_are_the_plain_sum_of_the_adapters() -> None:
    model, plain = made({}), build_model("llama").double()
    set_gates(model, 50.0)
    experts = dict(named_experts(model))
    for name, expert in experts.items():
        if name.endswith(".weight"):
            with torch.no_grad():
                plain.get_parameter(name).add_(4.0 * expert.up @ expert.down)
    for number, layer in enumerate(plain.model.layers):
        adapter = experts[f"model.layers.{number}.mlp"]
        layer.mlp.register_forward_hook(
            lambda module, args, output, a=adapter: (
                output + F.silu(args[0] @ a.down.weight.T + a.down.bias) @ a.up.weight.T + a.up.bias
            )
        )
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-10, atol=1e-10)


def test_gates_follow_their_formula() -> None:
    for settings in (FORMS["sparse"], FORMS["swiglu"]):
        model = made(settings)
        (block, _), hidden = gates(model), torch.randn(7, 32, dtype=torch.float64)
        router = block.router
        if settings.get("router") == "swiglu":
            assert router.gate.weight.shape == (4 * 6, 32)
            inner = F.silu(hidden @ router.gate.weight.T) * (hidden @ router.up.weight.T)
            logits = inner @ router.out.weight.T
        else:
            logits = hidden @ router.weight.T + router.bias
        wanted = 1 / (1 + (-logits).exp())
        if "threshold" in settings:
            least = 0.8 / (1 + (-(hidden @ block.limit.weight.T + block.limit.bias)).exp())
            active = wanted >= least
            assert 0.2 < active.double().mean() < 0.8
            wanted = (wanted - least) * active
            assert torch.equal(block.shares(hidden) > 0, active)
        torch.testing.assert_close(block.shares(hidden), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("router_input", ["norm", "residual"])
def test_the_router_sees_what_enters_the_block_before_or_after_its_norm(router_input: str) -> None:
    model, entered = made({"router_input": router_input}), []
    layer = model.model.layers[1]
    layer.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    model(IDS)
    hidden = layer.input_layernorm(entered[0]) if router_input == "norm" else entered[0]
    assert torch.equal(layer.expert.shares(hidden), layer.expert._shares)


def test_the_sparse_form_computes_adapters_for_the_tokens_that_take_them_and_equals_masking() -> None:
    model = made(FORMS["sparse"])
    seen: list[tuple[int, int]] = []
    (block, _) = gates(model)
    with torch.no_grad():
        model(IDS)
        shares = block._shares.flatten(0, 1)
        x = torch.randn(2, 15, 32, dtype=torch.float64)
        for number in range(6):

            def adapter(rows: torch.Tensor) -> torch.Tensor:
                seen.append((number, len(rows)))  # noqa: B023 - called at once
                return rows.cos()[:, :9]

            found = block.gated(number, x, adapter)
            masked = shares[:, number].view(2, 15, 1) * x.cos()[..., :9]
            torch.testing.assert_close(found, masked, rtol=1e-10, atol=1e-10)
    assert seen == [(number, int((shares[:, number] > 0).sum())) for number in range(6)]
    assert 0 < sum(count for _, count in seen) < 6 * 30


def test_where_no_token_takes_an_adapter_it_still_has_a_gradient_of_zeros() -> None:
    model = made(FORMS["sparse"])
    set_gates(model, -50.0)
    base = build_model("llama").double()
    torch.testing.assert_close(model(IDS).logits, base(IDS).logits)
    model(IDS).logits.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


def test_prompts_are_attended_to_by_a_second_softmax_behind_gates_of_heads_and_block() -> None:
    model = made({"prompts": 3}, "qwen2")
    experts = dict(named_experts(model))
    prompts = experts["model.layers.0.self_attn"]
    attention = model.model.layers[0].self_attn
    queries = torch.randn(32, dtype=torch.float64)
    keys = prompts.prompts @ attention.k_proj.weight.T + attention.k_proj.bias
    values = prompts.prompts @ attention.v_proj.weight.T + attention.v_proj.bias
    wanted = []
    for head in range(4):
        own = slice(8 * (head // 2), 8 * (head // 2) + 8)
        scores = torch.stack([queries[8 * head : 8 * head + 8] @ key[own] / math.sqrt(8) for key in keys])
        wanted.append(prompts.heads[head].tanh() * (scores.softmax(0) @ values[:, own]))
    torch.testing.assert_close(prompts.attended(queries), torch.cat(wanted), rtol=1e-10, atol=1e-10)
    seen: list[torch.Tensor] = []
    attention.o_proj.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    attention.q_proj.register_forward_hook(lambda layer, args, output: seen.append(output))
    with torch.no_grad():
        model(IDS)
        queries, joined = seen
        found = gates(model)[0]._shares[..., -1, None] * prompts.attended(queries)
        seen.clear()
        nn.init.zeros_(prompts.heads)
        model(IDS)
    assert found.abs().max() > 1e-3
    torch.testing.assert_close(joined, seen[1] + found, rtol=1e-10, atol=1e-12)


def test_generation_with_kept_keys_and_values_is_that_without() -> None:
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(IDS).index_fill(1, torch.arange(3), 0)
    for form in ("prompts", "sparse"):
        model = made(FORMS[form])
        written = [model.generate(IDS, attention_mask=mask, use_cache=cache, **options) for cache in (True, False)]
        assert torch.equal(*written)
        base = build_model("llama").double().generate(IDS, attention_mask=mask, **options)
        assert not torch.equal(written[0], base)
