"""Every built-in router and a user's keep the contract, and the battery notices when one does not."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import modular_experts.routing as r
from modular_experts.deltas import Delta
from modular_experts.testing import check_router

ROUTERS = [
    r.Arrow(),
    r.Arrow(unit_inputs=True, scaled=True, select=r.Softmax(0.1)),
    r.Centroid(),
    r.Centroid(reject=0.1, select=r.TopK(2)),
    r.Centroid(reject=None, depths=[0.0, 0.5, 1.0], select=r.Threshold(0.1)),
    r.Classifier(decay=0.01),
    r.Classifier(decay=0.1, reject=None, depths=[1.0], select=r.Softmax(2.0)),
    r.Constant(),
    r.Energy(),
    r.Energy(select=r.Threshold(0.9)),
    r.KernelRidge(),
    r.KernelRidge(ridge=1e-3, reject=None, depths=[1.0], select=r.Softmax(0.1)),
    r.Phatgoose(),
]


@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: type(router).__name__)
def test_routers_keep_the_contract(router: r.Router) -> None:
    check_router(router)


def test_routers_whose_settings_follow_the_order_of_experts_keep_the_contract() -> None:
    check_router(r.Oracle({"task 0": 0, "task 1": 1, "task 2": 2, "task 3": 3}), order=False)
    check_router(r.Constant([0.5, 0.0, -1.0, 2.0]), order=False)


class Norms(r.Router):
    """Scores each expert by the column of its delta that the input's largest entry meets: a user's router."""

    scope = "linear"
    columns: Tensor

    def __init__(self, select: r.TopK | None = None) -> None:
        super().__init__(select)
        self.register_buffer("columns", torch.empty(0))

    def learn(self, deltas: Sequence[Delta | None], statistics: Sequence[Tensor]) -> None:
        self.experts = len(deltas)
        none = torch.zeros(next(delta.shape[1] for delta in deltas if delta is not None))
        self.columns = torch.stack([none if delta is None else delta.dense().norm(dim=0) for delta in deltas])

    def scores(self, hidden: Tensor) -> Tensor:
        return self.columns[:, hidden.abs().argmax(1)].T


class Draws(Norms):
    def learn(self, deltas, statistics):
        super().learn(deltas, statistics)
        self.columns = self.columns + 1e-3 * torch.randn(self.columns.shape)


class Forgets(Norms):
    def learn(self, deltas, statistics):
        super().learn(deltas, statistics)
        self.columns, self._buffers["columns"] = None, None
        self.kept = [torch.zeros(12) if delta is None else delta.dense().norm(dim=0) for delta in deltas]

    def scores(self, hidden):
        return torch.stack(self.kept)[:, hidden.abs().argmax(1)].T

    def load_state(self, state, experts):
        self.experts = experts
        self.kept = [torch.zeros(12)] * experts


class Remembers(Norms):
    def learn(self, deltas, statistics):
        before = self.columns
        super().learn(deltas, statistics)
        self.columns = self.columns if len(before) == 0 else (self.columns + before) / 2


class Centred(Norms):
    def scores(self, hidden):
        return super().scores(hidden - hidden.mean(0))


class Numbered(Norms):
    def scores(self, hidden):
        return super().scores(hidden) + torch.arange(self.experts)


class Clipped(Norms):
    def forward(self, hidden):
        found = self.scores(hidden).sort(dim=1, descending=True)
        return r.Gates(found.indices[:, : self.select.k], found.values[:, : self.select.k].softmax(1))


class Twice(Norms):
    def forward(self, hidden):
        gates = super().forward(hidden)
        return r.Gates(gates.ids.repeat(1, 2), gates.weights.repeat(1, 2) / 2)


class Rejecting(Norms):
    def forward(self, hidden):
        return super().forward(hidden).without(hidden[:, 0] > 0, self.experts)


class Uncounted(Norms):
    def learn(self, deltas, statistics):
        super().learn(deltas, statistics)
        self.experts = 0


class Half(Norms):
    def scores(self, hidden):
        return super().scores(hidden) * (torch.inf if hidden.dtype == torch.bfloat16 else 1)


@pytest.mark.parametrize("router", [r.KernelRidge(), r.Classifier()], ids=lambda router: type(router).__name__)
def test_a_prompt_and_its_part_count_as_one_prompt(router: r.Router) -> None:
    with pytest.raises(ValueError, match="expert 1 has 1 prompt, and at least 2 are needed"):
        router.learn([], [torch.ones(4, 700), torch.ones(2, 700)])


def test_a_router_of_ones_own_keeps_the_contract() -> None:
    check_router(Norms())
    check_router(Norms(r.TopK(2)))


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (Draws, "learning must draw no random numbers"),
        (Remembers, "learning the same again must give the same columns"),
        (Forgets, "a stored router must give the same"),
        (Centred, "the gates of an input must not depend on the other inputs"),
        (Numbered, "permuting the experts must permute their numbers only"),
        (Clipped, "more experts than there are must be refused"),
        (Twice, "an input must not have an expert twice"),
        (Rejecting, "the id 4 is the fallback, which only `rejects = True` allows"),
        (Uncounted, "learn must set experts to 4, not 0"),
        (Half, "the weights must be finite for torch.bfloat16 inputs"),
    ],
)
def test_the_battery_notices_what_breaks_the_contract(kind: type[r.Router], sentence: str) -> None:
    with pytest.raises(AssertionError, match=sentence):
        check_router(kind(r.TopK(2)))
