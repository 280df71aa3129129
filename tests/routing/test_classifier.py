"""The classifier is the softmax regression that its docstring states, found the same way each time."""

import torch
from torch import Tensor

from modular_experts.routing import Classifier, TopK
from modular_experts.routing import classifier as module


def prompts(apart: float, counts: tuple[int, ...] = (12, 8, 16)) -> list[Tensor]:
    made = torch.Generator().manual_seed(0)
    return [apart * torch.randn(3, generator=made) + torch.randn(count, 3, generator=made) for count in counts]


def test_it_is_the_minimum_of_cross_entropy_and_decay() -> None:
    given, decay = prompts(0.7), 0.02
    router = Classifier(decay=decay)
    router.learn([], given)
    x = torch.cat(given).double()
    spread = (x - x.mean(0)).square().mean().sqrt()
    weight = (router.weight.double() * spread).requires_grad_()
    bias = (router.bias.double() + router.weight.double() @ x.mean(0)).requires_grad_()
    loss = 0.5 * decay * weight.square().sum()
    for number, rows in enumerate(given):
        scores = (rows.double() - x.mean(0)) / spread @ weight.T + bias
        loss = loss - scores.log_softmax(1)[:, number].mean() / 3
    loss.backward()
    assert weight.grad.abs().max() < 1e-5
    assert bias.grad.abs().max() < 1e-5


def test_the_decay_is_the_best_on_prompts_that_were_left_out(monkeypatch) -> None:
    monkeypatch.setattr(module, "DECAYS", module.DECAYS[:3])  # the last one takes by far the longest
    # A prompt and its part are alike, and must be left out together.
    given = [rows.repeat_interleave(2, 0) for rows in prompts(1.6)]
    chosen = Classifier()
    chosen.learn([], given)
    losses = {}
    for decay in module.DECAYS:
        losses[decay], router = 0.0, Classifier(decay=decay)
        for fold in range(4):
            parts = [torch.arange(len(rows)) // 2 % 4 == fold for rows in given]
            router.learn([], [rows[~part] for rows, part in zip(given, parts, strict=True)])
            for number, (rows, part) in enumerate(zip(given, parts, strict=True)):
                losses[decay] -= router.scores(rows[part]).log_softmax(1)[:, number].sum().item() / len(rows)
    best = Classifier(decay=min(losses, key=losses.__getitem__))
    best.learn([], given)
    assert torch.equal(chosen.weight, best.weight)
    assert best.decay > 1e-3, "prompts that are hard to tell apart need a stronger decay"


def test_prompts_that_no_expert_claims_go_to_the_fallback() -> None:
    given = [rows.repeat_interleave(2, 0) for rows in prompts(4.0, (60, 60, 60))]
    router = Classifier(decay=0.01, reject=0.1, select=TopK(2))
    router.learn([], given)
    # The own scores come from fits that did not see the prompt or its part.
    own = []
    for fold in range(4):
        out = torch.arange(120) // 2 % 4 == fold
        left = Classifier(decay=0.01, reject=None)
        left.learn([], [rows[~out] for rows in given])
        own.append(left.scores(torch.cat([rows[out] for rows in given])).amax(1))
    torch.testing.assert_close(router.lowest, torch.cat(own).quantile(0.1), rtol=0.1, atol=0.1)
    between = torch.stack([rows.mean(0) for rows in given]).mean(0)[None]
    gates = router(torch.cat([between, given[1].mean(0)[None]]))
    assert gates.ids.tolist()[0][0] == 3
    assert gates.weights.tolist()[0] == [1.0, 0.0]
    assert gates.ids.tolist()[1][0] == 1
    always = Classifier(decay=0.01, reject=None)
    always.learn([], given)
    assert 3 not in always(between).ids
