"""AdaMix: the mean over its draws is the averaged expert, and draws are of the step, the layer and the seed."""

import itertools
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import build_model
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from testbed.checkpointing import check_checkpointing
from testbed.systems import filled, five_steps, random_weight
from torch import nn
from torch._dynamo.testing import CompileCounter

from modular_experts.evaluation import batch_losses
from modular_experts.experts import LoRAExpert
from modular_experts.injection import draw_experts, expert_layers, inject
from modular_experts.systems.ada_mix import AdaMixExpert, paired_losses
from modular_experts.testing import check_expert


def test_the_type_keeps_the_contract() -> None:
    torch.manual_seed(3)
    check_expert(partial(AdaMixExpert, copies=3), compile=False)


@pytest.mark.parametrize("share_up", [False, True])
def test_the_mean_over_all_independent_draws_is_the_averaged_expert(share_up: bool) -> None:
    weight, x = random_weight(), torch.randn(7, 10, dtype=torch.float64)
    expert = filled(AdaMixExpert(weight, rank=3, alpha=6.0, copies=4, share_up=share_up, consistency=0.0)).train()

    def mean(pairs) -> torch.Tensor:
        outputs = []
        for pair in pairs:
            expert.drawn = torch.tensor([pair])
            outputs.append(expert(x, weight, None))
        return torch.stack(outputs).mean(0)

    found = mean(itertools.product(range(1 if share_up else 4), range(4)))
    expert.eval()
    wanted = x @ (weight + 2.0 * expert.up.mean(0) @ expert.down.mean(0)).T
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(expert(x, weight, None), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x @ (weight + expert.delta(weight, weight.detach).dense()).T, wanted)
    if not share_up:
        expert.train()
        tied = mean((number, number) for number in range(4))
        assert (tied - wanted).abs().max() > 0.1, "with one draw for both halves the mean is another function"


def test_draws_are_independent_of_one_another_and_of_other_layers_and_come_again() -> None:
    expert = AdaMixExpert(random_weight(), copies=3, share_up=False)
    pairs, layers, times = Counter(), Counter(), Counter()
    for step in range(3000):
        expert.draw(f"0/{step}/a")
        first, second = map(tuple, expert.drawn.tolist())
        expert.draw(f"0/{step}/b")
        pairs[first] += 1
        times[first[0], second[0]] += 1
        layers[first[1], int(expert.drawn[0, 1])] += 1
    for counted in (pairs, layers, times):
        assert len(counted) == 9
        # Chi-square with 8 degrees of freedom; 26 is its 99.9 % quantile.
        assert sum((number - 3000 / 9) ** 2 / (3000 / 9) for number in counted.values()) < 26
    expert.draw("0/5/a")
    drawn = expert.drawn
    expert.draw("0/6/a")
    expert.draw("0/5/a")
    assert torch.equal(expert.drawn, drawn)


def test_copies_start_equal_as_a_lora_and_one_copy_is_one_bit_for_bit() -> None:
    weight = random_weight()
    torch.manual_seed(1)
    several = AdaMixExpert(weight, rank=3, copies=4)
    torch.manual_seed(1)
    one = AdaMixExpert(weight, rank=3, alpha=6.0, copies=1, consistency=0.0)
    torch.manual_seed(1)
    lora = LoRAExpert(weight, rank=3, alpha=6.0)
    assert all(torch.equal(copy, lora.down) for copy in several.down)
    one.draw("0")
    for expert in (one, lora):
        five_steps(expert, lambda x, expert=expert: expert(x, weight, None))
    ours, theirs = (expert.delta(weight, weight.detach) for expert in (one, lora))
    assert torch.equal(ours.up, theirs.up)
    assert torch.equal(ours.down, theirs.down)


def test_by_default_each_step_trains_the_one_up_and_the_down_that_it_draws() -> None:
    weight, made = random_weight(), torch.Generator().manual_seed(2)
    torch.manual_seed(1)
    expert = AdaMixExpert(weight, rank=3, alpha=6.0, copies=4, consistency=0.0).train()
    assert expert.settings()["share_up"] is True
    up, downs = torch.zeros(12, 3, dtype=torch.float64), expert.down.detach().clone()
    optimizer, trained = torch.optim.SGD(expert.parameters(), lr=0.1), set()
    for step in range(20):
        expert.draw(f"0/{step}/a")
        x = torch.randn(6, 10, dtype=torch.float64, generator=made)
        expert(x, weight, None).sub(1.0).square().sum().mul(0.01).backward()
        optimizer.step()
        optimizer.zero_grad()
        number = int(expert.drawn[0, 1])
        trained.add(number)
        # The gradient of 0.01 |x (W + 2 up down)' - 1|^2 by hand.
        error = 0.02 * (x @ (weight + 2.0 * up @ downs[number]).T - 1.0).T @ x
        grad_up, grad_down = 2.0 * error @ downs[number].T, 2.0 * up.T @ error
        up -= 0.1 * grad_up
        downs[number] -= 0.1 * grad_down
    assert trained == {0, 1, 2, 3}
    delta = expert.delta(weight, weight.detach)
    torch.testing.assert_close(delta.dense(), 2.0 * up @ downs.mean(0))
    assert delta.dense().abs().max() > 0.1


def batch() -> dict:
    ids, mask = torch.arange(5, 29).view(4, 6), torch.ones(4, 6, dtype=torch.int64)
    mask[0, 4:] = mask[2, 5:] = 0
    labels = ids.where((mask == 1) & (torch.arange(6) > 1), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "task": list("abcd")}


def equipped(**settings) -> nn.Module:
    model = build_model("gpt2" if settings.pop("gpt2", False) else "llama", attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)
    model = model.double()
    inject(model, lambda weight: filled(AdaMixExpert(weight, **({"copies": 3, "rank": 2} | settings))), "all-linear")
    return model.train()


@pytest.mark.parametrize("packed", [False, True])
def test_two_passes_are_two_draws_and_pay_for_their_symmetric_divergence(packed: bool) -> None:
    model, rows = equipped(), batch()
    if packed:
        places = torch.arange(6).repeat(2, 2)
        tokens = rows["attention_mask"].view(2, 12) == 1
        rows["row"] = torch.arange(4).repeat_interleave(6).view(2, 12).where(tokens, -1)
        rows |= {
            "position_ids": places,
            "input_ids": rows["input_ids"].view(2, 12),
            "labels": rows["labels"].view(2, 12),
        }
        del rows["attention_mask"]
    draw_experts(model, "0/1")
    sums, counts, divergence = paired_losses(model, rows)
    predictions = []
    experts = [layer.expert for _, layer in expert_layers(model)]
    both = [expert.drawn for expert in experts]
    for time in range(2):
        for expert, drawn in zip(experts, both, strict=True):
            expert.drawn = drawn[time : time + 1]
        alone, numbers = batch_losses(model, batch())
        if not time:
            torch.testing.assert_close(sums, alone)
            assert torch.equal(counts, numbers)
        logits = model(input_ids=batch()["input_ids"], attention_mask=batch()["attention_mask"]).logits[:, :-1]
        predictions.append(logits[batch()["labels"][:, 1:] != -100].softmax(-1))
    p, q = predictions
    assert (p - q).abs().max() > 1e-3
    wanted = 0.5 * ((p * (p / q).log()).sum() + (q * (q / p).log()).sum())
    torch.testing.assert_close(divergence, wanted)
    draws = [drawn[:1].repeat(2, 1) for drawn in both]
    for expert, drawn in zip(experts, draws, strict=True):
        expert.drawn = drawn
    assert paired_losses(model, batch())[2].abs() < 1e-10, "equal predictions are not apart"


@pytest.mark.parametrize("gpt2", [False, True])
def test_gradient_checkpointing_repeats_both_draws(gpt2: bool) -> None:
    def loss(model: nn.Module) -> torch.Tensor:
        draw_experts(model, "0/1")
        sums, _, divergence = paired_losses(model, batch())
        return sums.sum() + divergence

    check_checkpointing(lambda: equipped(gpt2=gpt2), loss)


def test_a_compiled_model_follows_the_draws_without_being_compiled_again() -> None:
    network = torch.nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 10)).double()
    inject(network, lambda weight: filled(AdaMixExpert(weight, copies=4)), ".*")
    counter = CompileCounter()
    compiled = torch.compile(network.train(), backend=counter)
    x, found = torch.randn(4, 10, dtype=torch.float64), []
    for step in range(12):
        draw_experts(network, f"0/{step}")
        found.append(compiled(x).detach())
        assert torch.equal(found[-1], network(x))
    assert len({float(outputs.sum()) for outputs in found}) == 12
    assert counter.frame_count == 1


class Draws(Callback):
    """Keeps the draws of each step, and what is logged."""

    def __init__(self) -> None:
        self.drawn: list[dict] = []
        self.logged: list[dict] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.drawn.append(
            {name: list(map(tuple, layer.expert.drawn.tolist())) for name, layer in expert_layers(pl_module.model)}
        )
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def test_each_step_and_layer_draws_anew_and_micro_batches_share_a_draw(fit_tiny) -> None:
    draws = Draws()
    expert = partial(AdaMixExpert, copies=4, consistency=2.0)
    *_, losses = fit_tiny(expert, draws, accumulate_grad_batches=2, max_steps=4)
    assert len(losses) == 8
    assert draws.drawn[::2] == draws.drawn[1::2]
    assert len({tuple(pairs) for drawn in draws.drawn for pairs in drawn.values()}) > 8
    assert all(len(set(map(tuple, drawn.values()))) > 1 for drawn in draws.drawn)
    assert all(len(pairs) == 2 for drawn in draws.drawn for pairs in drawn.values())
    assert draws.logged[-1]["penalty/consistency"] > 0


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_run_with_draws_resumes_exactly(fit_tiny, tmp_path) -> None:
    def run(name: str, ckpt: Path | None = None):
        saving = ModelCheckpoint(tmp_path / name, every_n_train_steps=2, save_top_k=-1, filename="{step}")
        expert = partial(AdaMixExpert, copies=3, dropout=0.1)
        return fit_tiny(expert, saving, own={"dtype": "float64"}, ckpt=ckpt, enable_checkpointing=True, max_steps=4)

    whole, _, losses = run("whole")
    again, _, rest = run("again", tmp_path / "whole" / "step=2.ckpt")
    assert rest == losses[2:]
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in whole.state_dict().items())
