"""Experts as they train: the packed step equals a dense masked step, in any dtype, and nothing small is lost."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modular_experts.experts import FullExpert, LoRAExpert, MaskedExpert, SparseExpert
from modular_experts.injection import inject, write_experts
from modular_experts.native.kernel import kept_linear
from modular_experts.native.kernel_choice import make_kernel


def test_kept_linear_passes_gradcheck() -> None:
    torch.manual_seed(0)
    weight, indices = torch.randn(5, 4, dtype=torch.float64), torch.tensor([1, 7, 8, 19])
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    values = torch.zeros(4, dtype=torch.float64, requires_grad=True)

    def layer(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        effective = weight.clone()
        effective.view(-1)[indices] += values.detach()
        kernel = make_kernel("auto", indices, (5, 4), (1, 1), torch.float64)
        return kept_linear(x, effective, None, values, kernel)

    assert torch.autograd.gradcheck(layer, (x, values))


@pytest.mark.parametrize(("ratio", "kept"), [(0.29, 29), (0.57, 57), (0.295, 29), (0.001, 1), (1, 100)])
def test_a_share_keeps_as_many_entries_as_it_says(ratio: float, kept: int) -> None:
    assert SparseExpert(torch.zeros(10, 10), ratio).kept_units == kept


@pytest.mark.parametrize(
    "settings",
    [
        {"keep_ratio": 0.05},
        {"keep_ratio": 0.3},
        {"keep_ratio": 0.4, "granularity": "block", "block_size": 8},
        {"keep_ratio": 0.4, "granularity": "block", "block_size": 10},
        {"keep_ratio": 0.2, "granularity": "row"},
        {"keep_ratio": 0.2, "granularity": "column"},
    ],
    ids=str,
)
def test_packed_adamw_steps_equal_dense_masked_ones_in_float64(settings: dict) -> None:
    """Weight decay pulls the delta to zero, as it does for the packed values."""
    torch.manual_seed(0)
    layer, base = nn.Linear(24, 36).double(), None
    base = layer.weight.detach().clone()
    inject(nn.Sequential(layer), lambda w: SparseExpert(w, **settings), "0")
    expert, x = layer.expert, torch.randn(8, 24, dtype=torch.float64)
    mask = torch.zeros(base.numel(), dtype=torch.bool)
    mask[expert.delta(layer.weight, None).support().long()] = True
    change = nn.Parameter(torch.zeros_like(base))
    mine = torch.optim.AdamW(expert.parameters(), lr=0.03, weight_decay=0.1)
    dense = torch.optim.AdamW([change], lr=0.03, weight_decay=0.1)
    for _ in range(5):
        layer(x).square().sum().backward()
        mine.step()
        mine.zero_grad()
        F.linear(x, base + change * mask.view_as(base), layer.bias).square().sum().backward()
        dense.step()
        dense.zero_grad()
    torch.testing.assert_close(expert.delta(layer.weight, None).dense(), change.detach(), rtol=1e-10, atol=1e-12)


def test_autocast_computes_in_bfloat16_and_trains_float32() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    inject(model, lambda w: SparseExpert(w, keep_ratio=0.3), ".*")
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.randn(4, 16))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_the_weight_holds_what_the_last_step_moved_as_soon_as_it_is_written() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    before = [layer.weight.detach().clone() for layer in model]
    inject(model, SparseExpert, ".*")
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
    model(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    write_experts(model)
    for layer, base in zip(model, before, strict=True):
        assert layer.expert.values.any()
        assert torch.equal(layer.weight, base + layer.expert.delta(layer.weight, None).dense())


def test_a_step_too_small_for_bfloat16_is_not_lost() -> None:
    layer = nn.Linear(8, 8, bias=False).bfloat16()
    nn.init.ones_(layer.weight)
    inject(nn.Sequential(layer), lambda w: SparseExpert(w, keep_ratio=1.0), "0")
    with torch.no_grad():
        for _ in range(10):
            layer.expert.values += 1e-3  # 1.0 + 1e-3 is 1.0 in bfloat16
    layer(torch.ones(1, 8).bfloat16())
    assert torch.equal(layer.weight, torch.full((8, 8), 1.01).bfloat16())


@pytest.mark.parametrize("granularity", ["element", "row"])
def test_a_wider_weight_holds_what_a_narrow_one_had_to_round(granularity: str) -> None:
    layer = nn.Linear(8, 8, bias=False).bfloat16()
    inject(nn.Sequential(layer), lambda w: SparseExpert(w, keep_ratio=0.5, granularity=granularity), "0")
    nn.init.constant_(layer.expert.values, 1e-4)
    base = layer.weight.detach().float()
    layer(torch.ones(1, 8).bfloat16())
    layer.float()(torch.ones(1, 8))
    assert torch.equal(layer.weight, base + layer.expert.delta(layer.weight, None).dense())


def test_trained_values_stay_float32_when_the_model_is_cast() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, bias=False).bfloat16())
    inject(model, {"0": LoRAExpert, "1": FullExpert})
    model[0].bfloat16()
    trained = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert trained == dict.fromkeys(["0.expert.up", "0.expert.down", "1.weight"], torch.float32)
    assert model[0].weight.dtype == torch.bfloat16
    assert model(torch.ones(1, 8).bfloat16()).dtype == torch.bfloat16


class ThroughData(torch.optim.SGD):
    def step(self, closure=None) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.data -= parameter.grad


@pytest.mark.parametrize("kind", [lambda trained: torch.optim.AdamW(trained, fused=True), ThroughData])
def test_a_step_that_torch_does_not_count_reaches_the_weight(kind) -> None:
    layer, x = nn.Linear(8, 8, bias=False), torch.randn(2, 8)
    inject(nn.Sequential(layer), lambda w: SparseExpert(w, keep_ratio=0.5), "0")
    optimizer, before = kind(list(layer.expert.parameters())), layer.weight.detach().clone()
    layer(x).square().sum().backward()
    optimizer.step()
    moved = layer.expert.delta(layer.weight, None).dense().detach()
    assert moved.any()
    torch.testing.assert_close(layer(x), x @ (before + moved).T)


def test_a_step_leaves_parameters_without_a_gradient_to_graphs_that_wait() -> None:
    first, second, x = nn.Linear(3, 3), nn.Linear(3, 3), torch.ones(1, 3, requires_grad=True)
    waiting = second(x).sum()
    first(x).sum().backward()
    torch.optim.SGD([*first.parameters(), *second.parameters()]).step()
    waiting.backward()
    assert second.weight.grad is not None


def test_a_change_through_data_needs_write() -> None:
    layer = nn.Linear(8, 8)
    inject(nn.Sequential(layer), lambda w: SparseExpert(w, keep_ratio=1.0), "0")
    x, before = torch.randn(2, 8), None
    before = layer(x)
    layer.expert.values.data += 1.0
    layer.expert.write(layer.weight)
    torch.testing.assert_close(layer(x), before + x.sum(1, keepdim=True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "settings", "sentence"),
    [
        *(
            (kind, {"keep_ratio": ratio}, rf"keep_ratio={ratio} is outside \(0, 1\]")
            for kind in (SparseExpert, MaskedExpert)
            for ratio in (0.0, -0.1, 1.5)
        ),
        (LoRAExpert, {"rank": 0}, "rank=0"),
        (LoRAExpert, {"rank": 99}, "rank=99"),
        (LoRAExpert, {"dropout": 1.0}, "dropout"),
    ],
)
def test_numbers_without_meaning_are_refused(kind: type, settings: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        kind(torch.zeros(8, 8), **settings)


def test_lora_scales_are_the_published_ones() -> None:
    weight = torch.zeros(64, 64)
    assert LoRAExpert(weight, rank=16, alpha=8).scale == 0.5
    assert LoRAExpert(weight, rank=16, alpha=8, rank_stabilized=True).scale == 2.0


def test_masked_expert_hides_and_does_not_erase() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 6, bias=False)
    inject(nn.Sequential(layer), lambda w: MaskedExpert(w, keep_ratio=0.25), "0")
    expert = layer.expert
    with torch.no_grad():
        expert.change.copy_(torch.arange(36.0).view(6, 6) + 1)
    shown = torch.tensor([0, 7, 35])
    expert.reselect(layer.weight, shown)
    assert expert.delta(layer.weight, None).values.tolist() == [1.0, 8.0, 36.0]
    expert.reselect(layer.weight, torch.tensor([1, 7]))
    assert expert.delta(layer.weight, None).values.tolist() == [2.0, 8.0]
    assert expert.scored(layer.weight)[1].dense()[0, 0] == 1.0  # the hidden entry still counts in the next score
    expert.reselect(layer.weight, shown)
    assert expert.delta(layer.weight, None).values.tolist() == [1.0, 8.0, 36.0]


def test_masked_expert_gives_hidden_entries_no_gradient() -> None:
    layer = nn.Linear(6, 6, bias=False)
    inject(nn.Sequential(layer), lambda w: MaskedExpert(w, keep_ratio=0.25, dense_start=False), "0")
    layer(torch.randn(5, 6)).square().sum().backward()
    assert torch.equal(layer.expert.change.grad != 0, layer.expert.mask)
