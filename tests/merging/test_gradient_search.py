"""AdaMerging and ATLAS step as Adam does on the gradients of their objectives."""

import pytest
import torch
from testbed.searching import (
    NAMES,
    descent,
    entropy_by_hand,
    loss_by_hand,
    objective_on,
    random_experts,
    state,
)
from torch.func import functional_call

from modular_experts.evaluation import batch_losses
from modular_experts.merging.combination import Combination
from modular_experts.merging.gradient_search import ATLAS, AdaMerging, joint
from modular_experts.merging.objective import batch_divergences
from modular_experts.methods import Average


@pytest.fixture
def objective(tiny_llama_dir, task_files):
    return objective_on(tiny_llama_dir, task_files, sharpness=20)


LOSSES = {"steps": 3, "learning_rate": 0.05, "start": [0.5] * 4}
SEARCHES = [
    pytest.param(AdaMerging(per="weight", steps=4, learning_rate=0.02), entropy_by_hand, id="entropies, weight"),
    pytest.param(ATLAS(**LOSSES, per="row", decay=True), loss_by_hand, id="losses, row"),
]


@pytest.mark.parametrize(("search", "by_hand"), SEARCHES)
def test_the_steps_are_adams_on_the_mean_of_each_tasks_own_measure(objective, search, by_hand) -> None:
    """The reference has a graph through the explicit sum in float64, and measures each task alone."""
    experts = [{name: delta.to(dtype=torch.float64) for name, delta in e.items()} for e in random_experts(objective)]
    model = objective.model.double()
    before = state(model)
    with Combination(model, experts) as combination:
        found = search.search(combination, objective)
        names = combination.names
        rows = combination.rows if search.per == "row" else [1] * len(names)
    mine = torch.full(
        (sum(rows), len(experts)), 0.5 if by_hand is loss_by_hand else 0.3, dtype=torch.float64, requires_grad=True
    )
    optimizer = torch.optim.Adam([mine], lr=search.learning_rate)
    for step in range(search.steps):
        left = 1 - step / search.steps if search.per == "row" else 1
        optimizer.param_groups[0]["lr"] = search.learning_rate * left
        moved, losses = dict(before), {}
        for own, name in zip(mine.split(rows), names, strict=True):
            terms = [own[:, place, None] * e[name].dense() for place, e in enumerate(experts) if name in e]
            moved[name] = before[name] + sum(terms)
        for task, batches in objective.batches.items():
            batch = batches[step % len(batches)]
            inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
            losses[task] = by_hand(functional_call(model, moved, kwargs=inputs).logits, batch["labels"])
        optimizer.zero_grad()
        (sum(losses.values()) / len(losses)).backward()
        optimizer.step()
        if by_hand is entropy_by_hand:
            mine.data.clamp_(0, 1)
        exact = {task: loss.item() for task, loss in losses.items()}
        assert found.trials[step].losses == pytest.approx(exact, rel=1e-9)
    torch.testing.assert_close(found.coefficients, mine.detach(), rtol=1e-7, atol=1e-9)


def test_steps_take_the_batches_in_turn(tiny_llama_dir, task_files) -> None:
    objective = objective_on(tiny_llama_dir, task_files, sharpness=20, eval_limit=6)
    assert [len(batches) for batches in objective.batches.values()] == [2, 2]
    with Combination(objective.model, random_experts(objective)[:1]) as combination:
        trials = AdaMerging(steps=3, learning_rate=1e-9).search(combination, objective).trials
    assert trials[0].losses == pytest.approx(trials[2].losses, rel=1e-5)
    assert trials[0].losses != pytest.approx(trials[1].losses, rel=1e-5)


@pytest.fixture
def smooth(tiny_llama_dir, task_files):
    return objective_on(tiny_llama_dir, task_files)


def average_of(experts):
    return {name: Average().merge([expert[name] for expert in experts]) for name in NAMES}


def test_it_starts_at_a_merge_and_corrects_it(smooth) -> None:
    experts = [descent(smooth, task, 2.0) for task in ("upper", "reverse")]
    merged = average_of(experts)
    at_the_merge = smooth.losses_with(merged)
    with Combination(smooth.model, [merged, *experts], merges=1) as combination:
        stays = ATLAS(steps=1, learning_rate=1e-12).search(combination, smooth)
        moves = ATLAS(steps=12, learning_rate=0.02).search(combination, smooth)
    torch.testing.assert_close(stays.coefficients, torch.tensor([[1.0, 0.0, 0.0]]).double().expand(len(NAMES), -1))
    assert stays.losses == pytest.approx(at_the_merge, rel=1e-5)
    assert sum(moves.losses.values()) < sum(at_the_merge.values())


def rows_of(model, batches, measure):
    """Return task, number of tokens and sum of each row, sorted."""
    parts = [(batch["task"], *measure(model, batch)[::-1]) for batch in batches]
    return sorted(row for task, *both in parts for row in zip(task, *(one.tolist() for one in both), strict=True))


@pytest.mark.parametrize(("tokens", "passes"), [(10**6, 1), (1, 4)])
def test_joint_batches_measure_each_row_as_its_own_batch_does(smooth, tokens, passes) -> None:
    own = dict(zip(smooth.batches, random_experts(smooth, 0.5), strict=False))
    smooth.remember(own)
    model, apart = (smooth.model.double(), [batch for batches in smooth.batches.values() for batch in batches][:4])
    together = joint(apart, tokens)
    assert len({batch["input_ids"].shape[1] for batch in apart}) > 1, "some are padded"
    assert len(together) == passes
    for measure in (batch_losses, batch_divergences):
        single, joined = (rows_of(model, batches, measure) for batches in (apart, together))
        assert [row[:2] for row in joined] == [row[:2] for row in single]
        assert [row[2] for row in joined] == pytest.approx([row[2] for row in single], rel=1e-9)


def test_a_joint_batch_has_at_most_so_many_tokens_with_its_padding(smooth) -> None:
    apart = [batch for batches in smooth.batches.values() for batch in batches]
    most = 2 * max(batch["input_ids"].numel() for batch in apart)
    together = joint(apart, most)
    assert 1 < len(together) < len(apart)
    assert max(batch["input_ids"].numel() for batch in together) <= most
    assert sum(len(batch["task"]) for batch in together) == sum(len(batch["task"]) for batch in apart)
