"""Kernel ridge regression is the formula that its docstring states, and n-grams are read from the prompt alone."""

import pytest
import torch
import torch.nn.functional as F
from conftest import build_model
from test_routed import experts_of
from testbed.padded_rows import ROWS, padded
from torch import Tensor

from modular_experts.injection.routed import routed
from modular_experts.routing import KernelRidge, Softmax, TopK
from modular_experts.routing import kernel_ridge as module
from modular_experts.routing.gates import reading
from modular_experts.routing.prompts import Packs, prompt_grams, prompt_vectors
from modular_experts.routing.router import GRAMS


def prompts(counts: tuple[int, ...] = (12, 8, 16), apart: float = 1.0, seed: int = 0) -> list[Tensor]:
    """Return prompts and parts in turn: six numbers of hidden states, and n-grams of which each expert has some."""
    made = torch.Generator().manual_seed(seed)
    found = []
    for number, count in enumerate(counts):
        hidden = apart * F.one_hot(torch.tensor(number), 6) + 0.3 * torch.randn(count, 6, generator=made)
        grams = torch.zeros(count, GRAMS)
        grams.scatter_(1, 40 * number + torch.randint(60, (count, 5), generator=made), 1.0)
        found.append(torch.cat([hidden, F.normalize(grams, dim=1)], 1))
    return found


def by_hand(given: list[Tensor], x: Tensor, ridge: float, shrink: float) -> Tensor:
    """Return the values `(n, experts)` of the regression for inputs, by other formulas than the router's."""
    rows, counts = torch.cat(given).double(), [len(own) for own in given]
    hidden, grams = rows[:, :-GRAMS], rows[:, -GRAMS:]
    means = torch.stack([own[::2, :-GRAMS].double().mean(0) for own in given])
    owner, whole = torch.repeat_interleave(torch.tensor(counts)), hidden[::2]
    around = whole - means[owner[::2]]
    covariance = around.T @ around / (len(whole) - len(given))
    shrunk = (1 - shrink) * covariance + shrink * covariance.diagonal().mean() * torch.eye(6).double()
    middle = means.mean(0)

    def distances(some: Tensor, others: Tensor) -> Tensor:
        gaps = some[:, None] - others
        return (gaps * torch.linalg.solve(shrunk, gaps.mT).mT).sum(2)

    unit = distances(whole, middle[None]).mean()
    rarity = ((1 + len(rows)) / (1 + (grams != 0).sum(0))).log() + 1

    def kernel(some: Tensor, others: Tensor) -> Tensor:
        near = (-2 * distances(some[:, :-GRAMS], others[:, :-GRAMS]) / unit).exp()
        words = [F.normalize(part[:, -GRAMS:] * rarity, dim=1) for part in (some, others)]
        return near + words[0] @ words[1].T / 4

    weights = 1 / torch.tensor(counts).double()[owner]
    inner, targets = kernel(rows, rows), F.one_hot(owner, len(given)).double()
    # The gradient of the weighted squares and the ridge is zero.
    system = inner @ (weights[:, None] * inner) + ridge * len(given) * inner
    return kernel(x.double(), rows) @ (torch.linalg.pinv(system) @ inner @ (weights[:, None] * targets))


def test_it_minimises_the_weighted_squares_and_the_ridge() -> None:
    given, fresh = prompts(), torch.cat(prompts(seed=1))
    router = KernelRidge(ridge=0.01, shrink=0.2, reject=None)
    router.learn([], given)
    torch.testing.assert_close(router.scores(fresh).double(), by_hand(given, fresh, 0.01, 0.2), rtol=1e-4, atol=1e-5)


def test_own_prompts_are_measured_by_regressions_without_them() -> None:
    given = prompts((20, 20, 20), apart=2.0)
    router = KernelRidge(ridge=0.01, reject=0.0, select=TopK(2))
    router.learn([], given)
    values, nearest = [], []
    for fold in range(4):
        out = torch.arange(20) // 2 % 4 == fold
        left = KernelRidge(ridge=0.01, reject=None)
        left.learn([], [rows[~out] for rows in given])
        fresh = torch.cat([rows[out][::2] for rows in given])
        points = [(rows[:, :-GRAMS] - left.middle) @ left.directions for rows in (fresh, torch.cat(given))]
        gaps = (points[0][:, None] - points[1][~out.repeat(3)]).square().sum(2)
        values.append(left.scores(fresh).amax(1))
        nearest.append(gaps.amin(1))
    least = torch.cat(values) - module.FAR * torch.cat(nearest) / torch.cat(nearest).median()
    torch.testing.assert_close(router.lowest, least.min(), rtol=1e-4, atol=1e-4)
    far = torch.cat([torch.full((1, 6), 9.0), torch.zeros(1, GRAMS)], 1)
    gates = router(torch.cat([far, given[1][:1]]))
    assert gates.ids[:, 0].tolist() == [3, 1]
    assert gates.weights[0].tolist() == [1.0, 0.0]
    # Most prompts come again in other folds, where rounding alone keeps them apart.
    again = [rows[:10].repeat(5, 1) for rows in given]
    router.learn([], again)
    assert 3 not in router(torch.cat(again)[::2] * (1 + 1e-6)).ids[:, 0]
    always = KernelRidge(reject=None)
    always.learn([], given)
    assert 3 not in always(far).ids


def test_it_learns_from_equal_shares_of_many_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 15)
    given = prompts((40, 8, 16))
    router = KernelRidge(reject=None)
    router.learn([], given)
    few = KernelRidge(reject=None)
    pairs = [rows.unflatten(0, (-1, 2)) for rows in given]
    few.learn([], [own.flatten(0, 1) for own in (pairs[0][::4], pairs[1], pairs[2][[0, 1, 3, 4, 6]])])
    assert torch.equal(router.prompts, few.prompts)


def test_n_grams_are_tokens_and_pairs_at_hashed_places() -> None:
    ids, mask = [[7, 0, 0], [8, 0, 0], [7, 8, 0]], [[1, 0, 0], [1, 0, 0], [1, 1, 0]]
    one, two, both = prompt_grams(torch.tensor(ids), torch.tensor(mask))
    assert one.norm() == two.norm() == 1
    assert [int((row != 0).sum()) for row in (one, two, both)] == [1, 1, 3]
    pair = both - one * (one @ both) - two * (two @ both)
    assert both[one != 0] * 3**0.5 == pytest.approx(one[one != 0])
    turned = prompt_grams(torch.tensor([[8, 7]]), None)[0]
    assert turned @ pair == pytest.approx(0.0, abs=1e-6), "a pair has an order"
    often = prompt_grams(torch.tensor([[7, 7, 7]]), None)[0]
    sizes = torch.tensor([4.0, 3.0]).log()
    assert often[one != 0].abs().item() == pytest.approx((sizes[0] / sizes.norm()).item())
    many = prompt_grams(torch.arange(GRAMS)[:, None], None)
    assert 0.55 * GRAMS < (many != 0).any(0).sum() < 0.72 * GRAMS, "places are as if drawn: 1 - 1/e of them are taken"
    assert 0.4 * GRAMS < (many.sum(1) > 0).sum() < 0.6 * GRAMS, "half of the signs are positive"


@pytest.mark.parametrize("side", ["left", "right"])
def test_n_grams_ignore_padding_answers_and_other_rows(side: str) -> None:
    batch = padded(ROWS, side)
    found = prompt_grams(batch["input_ids"], batch["attention_mask"])
    alone = torch.cat([prompt_grams(torch.tensor([row]), None) for row in ROWS])
    assert torch.equal(found, alone)
    answered = torch.tensor([[*row, 50, 51] for row in ROWS[:1]])
    assert torch.equal(prompt_grams(answered, None, torch.arange(7)[None] < 5), alone[:1])
    packed = torch.tensor([[*ROWS[0], *ROWS[1], 0], [*ROWS[2], *ROWS[3], 0, 0, 0]])
    rows = torch.tensor([[0] * 5 + [1] * 3 + [-1], [2] * 4 + [3] * 2 + [-1] * 3])
    places = torch.tensor([[*range(5), *range(3), 0], [*range(4), *range(2), 0, 0, 0]])
    assert torch.equal(prompt_grams(packed, Packs(rows, places)), alone)


def test_a_short_or_empty_prompt_has_a_gate() -> None:
    model = build_model("llama").double()
    router = KernelRidge(reject=None, select=Softmax(0.1))
    made = torch.Generator().manual_seed(5)
    given = []
    for number in range(3):
        ids = 5 + 20 * number + torch.randint(0, 12, (24, 6), generator=made)
        given.append(torch.cat([*prompt_vectors(model, ids, None, router.depths), prompt_grams(ids, None)], 1))
    router.learn([], given)
    with routed(model, experts_of(model), router) as running, torch.no_grad():
        for empty in (torch.tensor([[False, False]]), torch.tensor([[True, False]])):
            with reading(empty):
                model(input_ids=torch.tensor([[7, 50]]))
            assert running.current.gates.weights.isfinite().all()


def test_settings_out_of_range_are_refused() -> None:
    for wrong in ({"ridge": 0.0}, {"shrink": 0.0}, {"reject": 1.0}, {"depths": [2.0]}):
        with pytest.raises(ValueError, match=f"KernelRidge: .*{next(iter(wrong))}="):
            KernelRidge(**wrong)
