"""Check that a router, built-in or your own, keeps its promises: `check_router(MyRouter())`."""

import copy
import inspect
import json
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from modular_experts.deltas import Delta
from modular_experts.injection.attach import describe_router, make_router
from modular_experts.library.described import class_path, trust
from modular_experts.routing import Gates, Router, TopK
from modular_experts.routing.gates import reading
from modular_experts.routing.router import GRAMS
from modular_experts.testing.methods import FORMS, close, made_delta, made_statistic

_COUNT = 4
_SHAPE = (10, 12)
_TASKS = [f"task {number}" for number in range(_COUNT)]


def check_router(router: Router, deltas: Sequence[Delta | None] | None = None, order: bool = True) -> None:
    """Check that a router keeps the contract of `Router`, on four experts that the battery makes up.

    Always checked: learning draws no random numbers and changes nothing that it is given; gates are finite and name
    an expert at most once, for inputs in float32, float64 and bfloat16; the gates of an input depend neither on the
    other inputs nor on their order; a router made from the settings that a record keeps, with the state that the
    library keeps, gives the same gates; more experts than there are cannot be asked for.

    Args:
        router: The router with its settings, before it has learned anything. The rows of the battery are of the tasks
            `task 0` to `task 3`.
        deltas: The experts' deltas of one weight, where a router of scope `linear` does not take every form.
        order: Permuting the experts permutes their numbers and changes nothing else.

    Raises:
        AssertionError: The router breaks a promise, which the message names.
    """
    case = _Case(router, deltas)
    _check_learning(case)
    learned = case.learned(router)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        _check_gates(case, learned, dtype)
    _check_inputs(case, learned)
    _check_stored(case, learned)
    if order:
        _check_order(case, learned)
    if "select" in inspect.signature(type(router)).parameters:
        _check_too_many(case)


class _Case:
    """The router under test, its statistics, and inputs `(n, size)` near the prompts of each expert."""

    def __init__(self, router: Router, deltas: Sequence[Delta | None] | None) -> None:
        draw = torch.Generator().manual_seed(0)
        self.router = router
        if deltas is None:
            deltas = [*(made_delta(form, _SHAPE, seed) for seed, form in enumerate(FORMS[:-1])), None]
        self.deltas: list[Delta | None] = list(deltas)
        if router.scope != "linear":
            self.deltas = [None for _ in range(_COUNT)]
        count = len(self.deltas)
        if router.scope == "sample":
            size = 8 * len(router.depths) + (GRAMS if router.reads_grams else 0)
        else:
            size = next(delta.shape[1] for delta in deltas if delta is not None)
        middles = torch.randn(count, size, generator=draw)
        self.statistics: list[Tensor] = []
        if router.needs in ("prompts", "prompt_parts"):
            self.statistics = [_near(middle, 24, draw) for middle in middles]
        elif router.needs == "gates":
            self.statistics = list(torch.randn(count, size, generator=draw))
        elif router.needs is not None:
            made = [made_statistic(router.needs, torch.Size(_SHAPE), seed) for seed in range(count)]
            self.statistics = [statistic.values for statistic in made if statistic is not None]
        self.inputs = torch.cat([*(_near(middle, 3, draw) for middle in middles), torch.linspace(-50, 50, size)[None]])
        self.tasks = [*(_TASKS[number % _COUNT] for number in range(count) for _ in range(3)), "another task"]

    def learned(self, router: Router, order: Sequence[int] | None = None) -> Router:
        """Return a copy of a router that has learned the experts, in an order, and is in its layer."""
        turned = range(len(self.deltas)) if order is None else order
        learned = copy.deepcopy(router)
        deltas = [self.deltas[number] for number in turned]
        learned.learn(deltas, [self.statistics[number] for number in turned] if self.statistics else [])
        if router.scope == "linear":
            learned.held(deltas)
        return learned

    def gates(self, router: Router, rows: Sequence[int] | None = None, dtype: torch.dtype = torch.float32) -> Gates:
        """Return the gates of all inputs, or of some."""
        chosen = range(len(self.inputs)) if rows is None else rows
        with torch.no_grad(), reading(tasks=[self.tasks[row] for row in chosen]):
            return router(self.inputs[list(chosen)].to(dtype))

    def shares(self, router: Router, rows: Sequence[int] | None = None) -> Tensor:
        """Return how much of each expert, and at the end of the fallback, each input takes, `(n, experts + 1)`."""
        gates = self.gates(router, rows)
        empty = gates.weights.new_zeros(len(gates.ids), len(self.deltas) + 1)
        return empty.scatter_add(1, gates.ids, gates.weights)


def _near(middle: Tensor, count: int, draw: torch.Generator) -> Tensor:
    return F.normalize(middle + 0.3 * torch.randn(count, len(middle), generator=draw), dim=1)


def _check_learning(case: _Case) -> None:
    before = copy.deepcopy(case.deltas)
    statistics = [statistic.clone() for statistic in case.statistics]
    states = []
    with torch.random.fork_rng(devices=[]):
        # The second one has learned the experts in another order before.
        for seed, router in enumerate((case.router, case.learned(case.router, range(len(case.deltas))[::-1]))):
            torch.manual_seed(seed)
            random = torch.get_rng_state()
            learned = case.learned(router)
            assert torch.equal(torch.get_rng_state(), random), "learning must draw no random numbers"
            states.append(learned.state())
    assert learned.experts == len(case.deltas), f"learn must set experts to {len(case.deltas)}, not {learned.experts}"
    assert states[0].keys() == states[1].keys(), "learning the same again must give the same state"
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), f"learning the same again must give the same {name}"
        assert tensor.isfinite().all(), f"{name} of the state must be finite"
    for old, new in zip(before, case.deltas, strict=True):
        if old is not None and new is not None:
            pairs = zip(old.tensors().values(), new.tensors().values(), strict=True)
            assert all(torch.equal(*pair) for pair in pairs), "learning must not change the deltas"
    same = all(torch.equal(old, new) for old, new in zip(statistics, case.statistics, strict=True))
    assert same, "learning must not change the statistics"


def _check_gates(case: _Case, router: Router, dtype: torch.dtype) -> None:
    gates = case.gates(router, dtype=dtype)
    count = len(case.deltas)
    wanted = (len(case.inputs), gates.ids.shape[1])
    assert gates.ids.dtype == torch.int64, f"the ids must be int64, not {gates.ids.dtype}"
    assert gates.ids.shape == gates.weights.shape == wanted, f"ids and weights must have the shape {wanted}"
    assert gates.weights.isfinite().all(), f"the weights must be finite for {dtype} inputs"
    lowest = int(gates.ids.min())
    highest = int(gates.ids.max())
    assert 0 <= lowest <= highest <= count, f"the ids must be from 0 to {count}, not {lowest} to {highest}"
    assert highest < count or router.rejects, f"the id {count} is the fallback, which only `rejects = True` allows"
    ordered = gates.ids.sort(1).values
    assert (ordered[:, 1:] != ordered[:, :-1]).all(), "an input must not have an expert twice"


def _check_inputs(case: _Case, router: Router) -> None:
    together = case.shares(router)
    backwards = case.shares(router, range(len(case.inputs) - 1, -1, -1)).flip(0)
    close(backwards, together, "the order of the inputs must not matter")
    alone = torch.cat([case.shares(router, [row]) for row in range(len(case.inputs))])
    close(alone, together, "the gates of an input must not depend on the other inputs")


def _check_stored(case: _Case, router: Router) -> None:
    settings = describe_router(case.router)
    kind = settings["router"]
    try:
        plain = json.loads(json.dumps(settings))
    except TypeError as error:
        raise AssertionError(f"the settings of {kind} must be plain values, for a record: {error}") from error
    trust(type(router), type(router.select))
    again = make_router(class_path(type(router)), plain)
    again.load_state({name: tensor.clone() for name, tensor in router.state().items()}, router.experts)
    assert again.experts == router.experts, "load_state must set experts"
    if router.scope == "linear":
        again.held(case.deltas)
    for part in ("ids", "weights"):
        before = getattr(case.gates(router), part)
        after = getattr(case.gates(again), part)
        assert torch.equal(before, after), f"a stored router must give the same {part}"


def _check_order(case: _Case, router: Router) -> None:
    order = [2, 0, 3, 1]
    turned = case.shares(case.learned(case.router, order))
    there = torch.tensor([*order, len(order)])
    close(turned, case.shares(router)[:, there], "permuting the experts must permute their numbers only")


def _check_too_many(case: _Case) -> None:
    router = copy.deepcopy(case.router)
    router.select = TopK(len(case.deltas) + 1)
    try:
        case.gates(case.learned(router))
    except ValueError:
        return
    raise AssertionError("more experts than there are must be refused with a ValueError, as TopK does")
