"""Gates of Phatgoose: trained with the expert frozen, stored beside it, and compared with a token as the paper does."""

import math

import pytest
import torch
from conftest import build_model
from test_routed import experts_of

from modular_experts.base.apply import applied
from modular_experts.data.batch import IGNORED
from modular_experts.evaluation import batch_losses
from modular_experts.merging.gate_statistics import train_gates
from modular_experts.routing import Phatgoose


def batches(rows: int = 6) -> list[dict[str, torch.Tensor]]:
    ids = 3 + torch.randint(0, 20, (2, rows, 8), generator=torch.Generator().manual_seed(0))
    found = []
    for part in ids:
        labels = part.clone()
        labels[:, :4] = IGNORED
        found.append({"input_ids": part, "attention_mask": torch.ones_like(part), "labels": labels})
    return found


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_gates_lower_the_loss_and_leave_the_base_as_it_was(architecture: str) -> None:
    model = build_model(architecture)
    expert = {name: one * 2.0 for name, one in experts_of(model)[1].items()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = batches()
    found, losses = train_gates(model, expert, given[:1], steps=12, learning_rate=3e-2)
    # A gate starts at one half of the expert.
    with applied(model, [{name: one * 0.5 for name, one in expert.items()}]), torch.no_grad():
        summed, tokens = batch_losses(model, given[0])
    assert losses[0] == pytest.approx((summed.sum() / tokens.sum()).item(), rel=1e-4)
    assert losses[-1] < losses[0] - 0.05
    assert found.keys() == expert.keys()
    assert all(bool(one.values.any()) for one in found.values())
    assert sorted(model.state_dict()) == sorted(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    again, same = train_gates(model, expert, given[:1], steps=12, learning_rate=3e-2)
    assert losses == same
    assert all(torch.equal(again[name].values, found[name].values) for name in found)


def test_scores_are_products_of_standardised_vectors() -> None:
    made = torch.Generator().manual_seed(0)
    gates = [torch.randn(16, generator=made), torch.empty(0), torch.randn(16, generator=made)]
    router = Phatgoose()
    router.learn([None, None, None], gates)
    x = 3 * torch.randn(5, 16, generator=made, dtype=torch.float64) + 1

    def standardised(rows: torch.Tensor) -> torch.Tensor:
        centred = rows - rows.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    wanted = [standardised(x) @ standardised(gate.double()) / math.sqrt(16) for gate in (gates[0], gates[2])]
    wanted.insert(1, torch.zeros(5).double())
    torch.testing.assert_close(router.scores(x), torch.stack(wanted, 1), rtol=1e-6, atol=1e-6)
