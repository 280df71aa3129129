"""aTLAS goes down the loss with coefficients of either sign, from where it is told to start."""

from __future__ import annotations

import pytest
import torch
from testbed.searching import NAMES, descent, objective_on, random_experts, same_bits, state
from torch.func import functional_call

from modular_experts.evaluation import batch_losses
from modular_experts.methods import Average
from modular_experts.tuning import ATLAS, AdaMerging, Combination
from modular_experts.tuning.gradient_search import joint
from modular_experts.tuning.measures import batch_divergences


@pytest.fixture
def objective(tiny_llama_dir, task_files):
    return objective_on(tiny_llama_dir, task_files)


def average_of(experts):
    return {name: Average().merge([expert[name] for expert in experts]) for name in NAMES}


def test_an_expert_that_harms_is_taken_off(objective) -> None:
    helps = descent(objective, "upper", 2.0)
    harms = {name: -delta for name, delta in descent(objective, "reverse", 2.0).items()}
    before = state(objective.model)
    first = objective.losses()
    with Combination(objective.model, [helps, harms]) as combination:
        found = ATLAS(steps=12, learning_rate=0.05).search(combination, objective)
    assert same_bits(objective.model, before)
    assert sum(found.losses.values()) < 0.98 * sum(first.values())
    assert found.coefficients[:, 0].mean() > 0
    assert found.coefficients[:, 1].mean() < 0
    assert found.coefficients.unique(dim=0).shape[0] > 1


def test_it_starts_at_a_merge_and_corrects_it(objective) -> None:
    experts = [descent(objective, task, 2.0) for task in ("upper", "reverse")]
    merged = average_of(experts)
    at_the_merge = objective.losses_with(merged)
    with Combination(objective.model, [merged, *experts], merges=1) as combination:
        stays = ATLAS(steps=1, learning_rate=1e-12).search(combination, objective)
        moves = ATLAS(steps=12, learning_rate=0.02).search(combination, objective)
    torch.testing.assert_close(stays.coefficients, torch.tensor([[1.0, 0.0, 0.0]]).double().expand(len(NAMES), -1))
    assert stays.losses == pytest.approx(at_the_merge, rel=1e-5)
    assert sum(moves.losses.values()) < sum(at_the_merge.values())


def test_it_is_adamerging_on_the_loss_where_no_coefficient_meets_a_bound(objective) -> None:
    with Combination(objective.model, random_experts(objective)) as combination:
        free = ATLAS(steps=4, learning_rate=0.01, start=[0.5] * combination.experts)
        bounded = AdaMerging(objective="loss", steps=4, learning_rate=0.01, start=0.5)
        one, other = (search.search(combination, objective) for search in (free, bounded))
    assert torch.equal(one.coefficients, other.coefficients)


@pytest.mark.parametrize(("per", "decay"), [("weight", False), ("row", True)])
def test_the_steps_are_adams_on_the_mean_of_each_tasks_own_loss(objective, per, decay) -> None:
    """The reference has a graph through the explicit sum, and measures each task alone."""
    experts = [{name: d.to(dtype=torch.float64) for name, d in e.items()} for e in random_experts(objective)[:3]]
    model = objective.model.double()
    before = state(model)
    with Combination(model, experts) as combination:
        search = ATLAS(steps=3, learning_rate=0.05, start=[0.5, 0.5, 0.5], per=per, decay=decay)
        found = search.search(combination, objective)
        names, rows = combination.names, combination.rows if per == "row" else [1] * len(combination.names)
    mine = torch.full((sum(rows), 3), 0.5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([mine], lr=0.05)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 3) if decay else 0.05
        moved = dict(before)
        for own, name in zip(mine.split(rows), names, strict=True):
            terms = [own[:, number, None] * e[name].dense() for number, e in enumerate(experts)]
            moved[name] = before[name] + sum(terms)
        losses = []
        for batches in objective.batches.values():
            batch = batches[step % len(batches)]
            inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
            logits = functional_call(model, moved, kwargs=inputs).logits[:, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()))
        optimizer.zero_grad()
        (sum(losses) / len(losses)).backward()
        optimizer.step()
        exact = {task: loss.item() for task, loss in zip(objective.batches, losses, strict=True)}
        assert found.trials[step].losses == pytest.approx(exact, rel=1e-9)
    torch.testing.assert_close(found.coefficients, mine.detach(), rtol=1e-7, atol=1e-9)


def rows_of(model, batches, measure):
    """Return task, number of tokens and sum of each row, sorted."""
    parts = [(batch["task"], *measure(model, batch)[::-1]) for batch in batches]
    return sorted(row for task, *both in parts for row in zip(task, *(one.tolist() for one in both), strict=True))


@pytest.mark.parametrize(("tokens", "passes"), [(10**6, 1), (1, 4)])
def test_joint_batches_measure_each_row_as_its_own_batch_does(objective, tokens, passes) -> None:
    own = dict(zip(objective.batches, random_experts(objective, 0.5), strict=False))
    objective.remember(own)
    model, apart = objective.model.double(), [batch for batches in objective.batches.values() for batch in batches][:4]
    together = joint(apart, tokens)
    assert len({batch["input_ids"].shape[1] for batch in apart}) > 1, "some are padded"
    assert len(together) == passes
    for measure in (batch_losses, batch_divergences):
        single, joined = (rows_of(model, batches, measure) for batches in (apart, together))
        assert [row[:2] for row in joined] == [row[:2] for row in single]
        assert [row[2] for row in joined] == pytest.approx([row[2] for row in single], rel=1e-9)


def test_a_joint_batch_has_at_most_so_many_tokens_with_its_padding(objective) -> None:
    apart = [batch for batches in objective.batches.values() for batch in batches]
    most = 2 * max(batch["input_ids"].numel() for batch in apart)
    together = joint(apart, most)
    assert 1 < len(together) < len(apart)
    assert max(batch["input_ids"].numel() for batch in together) <= most
    assert sum(len(batch["task"]) for batch in together) == sum(len(batch["task"]) for batch in apart)
