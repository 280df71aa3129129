"""Estimate how much each way of `combine` reads, and show all its work as one progress.

Work is counted in tokens of a forward pass of the base; what else a token takes was measured on SmolLM2
(`benchmarks/combine_cost.py`).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from modular_experts.data import Inputs
from modular_experts.data.rows import spread_evenly
from modular_experts.library import StoredExpert, union_of_weights
from modular_experts.library.statistics import OF_INPUTS
from modular_experts.methods import Distilled
from modular_experts.progress import Counted, Progress
from modular_experts.routing import Router

Item = TypeVar("Item")

ANSWER = 8
"""Tokens that an answer of an expert is expected to have."""
ROUTED_PASS = 1.6
"""A pass of a routed expert, in passes of the base."""
SHRINK_PASSES = 6
"""Passes over an expert's rows until its smallest form is found, with those that answer."""
STEP = 3
"""A step of a search, forwards and backwards, in passes of the base over its rows."""


@dataclass(frozen=True)
class PlannedWay:
    """A way that is left, what it needs, and the seconds that it is expected to take."""

    name: str
    needs: str
    seconds: float


@dataclass(frozen=True)
class WorkPlan:
    """What `combine` is about to do.

    Attributes:
        ways: The ways that are left, in the order in which they are made.
        before: Seconds before all ways, in which the base and each task's own expert are measured, and prompts read.
    """

    ways: list[PlannedWay]
    before: float

    @property
    def seconds(self) -> float:
        """The expected seconds of all together."""
        return self.before + sum(way.seconds for way in self.ways)


class WayWork(NamedTuple):
    """How many tokens are read to make a way, and to measure it; `needs` names its sources."""

    needs: str
    making: float
    measuring: float


@dataclass(frozen=True)
class Work:
    """How many tokens each part of the work reads.

    Attributes:
        ways: The ways that are left, by name.
        prompts: The work of reading what routers learn from, which is done once.
        own: The work of measuring the base and each task's own expert.
    """

    ways: Mapping[str, WayWork]
    prompts: float
    own: float

    @property
    def tokens(self) -> float:
        """The work of all parts together."""
        return self.prompts + self.own + sum(way.making + way.measuring for way in self.ways.values())

    def plan(self, seconds: float) -> WorkPlan:
        """Return the plan of this work at some seconds a token."""
        ways = [PlannedWay(name, way.needs, seconds * (way.making + way.measuring)) for name, way in self.ways.items()]
        return WorkPlan(ways, seconds * (self.prompts + self.own))


@dataclass(frozen=True)
class WorkEstimate:
    """Estimates the work of each part.

    Attributes:
        experts: The experts.
        learned: The inputs that ways learn from.
        method: The settings of the search.
        parameters: How many parameters the base has.
        measured: The lengths of the rows that measure.
        answers: Whether experts answer these rows.
    """

    experts: Sequence[StoredExpert]
    learned: Inputs
    method: Distilled
    parameters: int
    measured: Sequence[int]
    answers: bool

    def _tokens(self, most: int, answer: int = ANSWER) -> float:
        """Return how many tokens at most so many inputs of each task have, with their answers."""
        kept = [prompt for prompts in self.learned.prompts.values() for prompt in spread_evenly(prompts, most)]
        return float(sum(len(prompt.ids) + answer for prompt in kept))

    def merge(self) -> float:
        """A merge without data, which multiplies each weight with a square matrix twice for each expert."""
        products = sum(shape.numel() * min(shape) for shape in union_of_weights(self.experts).values() if shape)
        return 2 * len(self.experts) * products / self.parameters

    def prompts(self, router: Router, rows: int) -> float:
        """What a router learns from; it reads prompts whole and in part, as deep as it asks for."""
        if router.needs in OF_INPUTS:
            return 2 * max(router.depths) * self._tokens(rows, 0)
        return self._tokens(rows) if router.needs else 0.0

    def shrink(self, rows: int) -> float:
        """The answers of each expert, and the loss of its forms."""
        return SHRINK_PASSES * self._tokens(rows)

    def distill(self) -> float:
        """The merge to start from, the answers of the experts, their predictions, and the steps."""
        steps = self.method.steps * self.method.batch
        inputs = sum(min(len(prompts), self.method.rows) for prompts in self.learned.prompts.values())
        seen = self._tokens(self.method.rows)
        return self.merge() + 2 * seen + STEP * seen / inputs * steps * len(self.learned.prompts)

    def train_one(self) -> float:
        """The answers of the experts, their predictions, and three epochs of training on all of them."""
        return (2 + 3 * STEP) * self._tokens(self.method.rows)

    def measure(self) -> float:
        """The rows that measure, once."""
        answers = ANSWER * len(self.measured) if self.answers else 0
        return float(sum(self.measured) + answers)

    def routed(self) -> float:
        """The same with a router and its experts."""
        return ROUTED_PASS * self.measure()

    def own(self) -> float:
        """The same with each task's own expert, which may have to answer first."""
        return self.measure() * (2 if self.answers else 1)


class WholeProgress:
    """One progress for work of many parts, in hundredths of the whole.

    Args:
        progress: Shows the hundredths.
        tokens: The work of all parts together.
    """

    def __init__(self, progress: Progress, tokens: float) -> None:
        self._hundredths = iter(progress(Counted(range(100), "%")))
        self._tokens = max(tokens, 1.0)
        self._done = 0.0
        self._shown = 0
        self._show()

    def _show(self) -> None:
        # The last hundredth is done when all is.
        while self._shown < 100 and self._shown <= 100 * self._done / self._tokens:
            next(self._hundredths, None)
            self._shown += 1

    def end(self) -> None:
        """Show that all work is done."""
        for _ in self._hundredths:
            pass

    @contextmanager
    def part(self, tokens: float, units: Mapping[str, float]) -> Iterator[Progress]:
        """Yield a progress for the loops inside one part of the work, which counts as done at the end.

        Args:
            tokens: The work of the part.
            units: The share of it that one loop over items of a unit is, such as {"steps": 0.7, "tasks": 0.15}.
        """
        goal = self._done + tokens

        def shown(items: Sequence[Item]) -> Iterator[Item]:
            share = tokens * units.get(getattr(items, "unit", ""), 0.0) / max(len(items), 1)
            for item in items:
                yield item
                self._done = min(self._done + share, goal)
                self._show()

        yield shown
        self._done = goal
        self._show()
