"""Search by evolution: the best candidates so far are changed and mixed, and a limit decides which may be measured.

A candidate is a tuple of genes. The papers (arXiv 2306.07967, 2409.17372) evolve whole generations; here each candidate
is measured before the next is made. The package cmaes finds about as much (`DECISIONS.md`).
"""

import math
import random
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from modular_experts.methods.settings import Checked, Checks, at_least, within
from modular_experts.progress import Counted, Progress

Value = int | float | str
Genes = tuple[Value, ...]

TRIES = 1000
"""How often a candidate that is outside the limit, or was measured before, is made anew."""


class Gene(Protocol):
    """What a place of a candidate may hold."""

    def draw(self, numbers: random.Random, /) -> Value:
        """Return any value."""

    def changed(self, value: Value, length: float, numbers: random.Random, /) -> Value:
        """Return another value; a number moves by about `length` times its range, or may stay as it is."""


@dataclass(frozen=True)
class Category:
    """One of `count` categories without an order, numbered from 0."""

    count: int

    def draw(self, numbers: random.Random) -> int:
        return numbers.randrange(self.count)

    def changed(self, value: Value, length: float, numbers: random.Random) -> int:
        return (int(value) + numbers.randrange(1, max(self.count, 2))) % self.count


@dataclass(frozen=True)
class Whole:
    """A whole number from `lowest` to `highest`."""

    lowest: int
    highest: int

    def draw(self, numbers: random.Random) -> int:
        return numbers.randint(self.lowest, self.highest)

    def changed(self, value: Value, length: float, numbers: random.Random) -> int:
        step = length * (self.highest - self.lowest) * numbers.gauss(0, 1)
        # A step below one half still moves every other time, but leaves numbers beside it a chance to move alone.
        moved = int(value) + int(math.copysign(max(round(abs(step)), numbers.randrange(2)), step))
        return min(max(moved, self.lowest), self.highest)


@dataclass(frozen=True)
class Real:
    """A number from `lowest` to `highest`."""

    lowest: float
    highest: float

    def draw(self, numbers: random.Random) -> float:
        return numbers.uniform(self.lowest, self.highest)

    def changed(self, value: Value, length: float, numbers: random.Random) -> float:
        step = length * (self.highest - self.lowest) * numbers.gauss(0, 1)
        return min(max(float(value) + step, self.lowest), self.highest)


@dataclass(frozen=True)
class Mask:
    """Some of `count` members, as a text with 1 for each member that is in and 0 for each that is not.

    A change exchanges some of them for as many others: so few that more than `overlap` of those that were in stay, but
    at least one. Algorithm 1 of arXiv 2409.17372 draws whole masks until one overlaps enough, which would hardly be
    found among many members.
    """

    count: int
    overlap: float = 0.8

    def draw(self, numbers: random.Random) -> str:
        return self._text(numbers.sample(range(self.count), numbers.randint(1, self.count)))

    def changed(self, value: Value, length: float, numbers: random.Random) -> str:
        held = [member for member, sign in enumerate(str(value)) if sign == "1"]
        others = sorted({*range(self.count)} - {*held})
        most = min(len(held) - math.floor(self.overlap * len(held)) - 1, len(others))
        exchanged = numbers.randint(1, max(most, 1)) if held and others else 0
        stays = numbers.sample(held, len(held) - exchanged)
        return self._text([*stays, *numbers.sample(others, exchanged)])

    def _text(self, members: Sequence[int]) -> str:
        held = set(members)
        return "".join("1" if member in held else "0" for member in range(self.count))


@dataclass(frozen=True, eq=False)
class Evolved:
    """What a search found.

    Attributes:
        best: The candidate with the lowest value.
        value: Its value.
        measured: All candidates with their values, in the order in which they were measured.
    """

    best: Genes
    value: float
    measured: list[tuple[Genes, float]]


@dataclass(frozen=True)
class Evolution(Checked):
    """An evolution of one candidate at a time, which keeps the best `parents` and makes each next one from them.

    A candidate is mixed from two parents, gene by gene, or is one parent with some genes changed. A number changes by a
    normal step, whose length grows with an improvement and else shrinks. With one parent, no crossover and all genes
    mutated this is the (1+1) evolution strategy with the one-fifth rule.

    Args:
        evaluations: Candidates that are measured, the budget of the search.
        first: How many of them are drawn at random, before parents are chosen.
        parents: How many of the best candidates have children.
        crossover: Share of the children with two parents, in [0, 1].
        mutation: Probability that a gene of the others changes, in (0, 1]; at least one changes.
        seed: Seed of all draws. Equal seeds and values give equal searches.
    """

    checks = Checks(**dict.fromkeys(("evaluations", "first", "parents"), at_least(1)))
    checks |= Checks(crossover=within("[0, 1]"), mutation=within("(0, 1]"))

    evaluations: int = 500
    first: int = 50
    parents: int = 10
    crossover: float = 0.5
    mutation: float = 0.2
    seed: int = 0

    def search(
        self,
        space: Sequence[Gene],
        function: Callable[[Genes], float],
        start: Sequence[Genes] = (),
        within: Callable[[Genes], Genes | None] = lambda genes: genes,
        store: MutableMapping[Genes, float] | None = None,
        progress: Progress = iter,
    ) -> Evolved:
        """Return the candidate with the lowest value; NaN counts as worse than every number.

        No candidate is measured twice. A search ends early when it finds none that is new.

        Args:
            space: What each gene may be.
            function: Measures a candidate.
            start: Candidates that are measured first, such as the present one, or the smallest.
            within: Puts a candidate inside the limit, and returns it, or None for one that is outside and drawn anew.
            store: Values of this function by candidate, such as `jobs.JSONLines(file)`, with which an interrupted
                search goes on exactly where it was.
            progress: Iterator wrapper, e.g. `tqdm`.

        Raises:
            ValueError: No candidate is inside the limit; nothing has been measured.
        """
        numbers = random.Random(self.seed)
        length = 1 / 6
        store = {} if store is None else store
        waiting = [genes for genes in dict.fromkeys(map(within, start)) if genes is not None]
        measured: dict[Genes, float] = {}
        best: list[tuple[float, Genes]] = []  # the lowest first, of equals the newest

        def fresh(number: int) -> tuple[Genes | None, float | None]:
            """Return a candidate inside the limit that was not measured, or None if there seems to be no other."""
            if waiting:
                return waiting.pop(0), None
            for attempt in range(2 * TRIES):
                made = tuple(gene.draw(numbers) for gene in space)
                parent = None
                # If one of the two ways finds nothing new, the other may.
                if best and (number < self.first) == (attempt >= TRIES):
                    made, parent = self._child(space, best, length, numbers)
                genes = within(made)
                if genes is not None and genes not in measured:
                    return genes, parent
            return None, None

        for number in progress(Counted(range(self.evaluations), "trials")):
            genes, parent = fresh(number)
            if genes is None:
                break
            if genes not in store:
                store[genes] = function(genes)
            value = measured[genes] = math.inf if math.isnan(store[genes]) else store[genes]
            if parent is not None:
                # The length is steady at one improvement to four failures.
                length *= math.exp(1 / 3 if value <= parent else -1 / 12)
            best = sorted([(value, genes), *best], key=lambda pair: pair[0])[: self.parents]
        if not measured:
            raise ValueError(f"none of {2 * TRIES} candidates drawn at random is inside the limit; widen the limit")
        value, genes = best[0]
        return Evolved(genes, value, list(measured.items()))

    def _child(
        self, space: Sequence[Gene], best: Sequence[tuple[float, Genes]], length: float, numbers: random.Random
    ) -> tuple[Genes, float | None]:
        """Return a child of the best, and the value of the parent that it changes."""
        if len(best) > 1 and numbers.random() < self.crossover:
            first, second = (genes for _, genes in numbers.sample(best, 2))
            return tuple(pair[numbers.randrange(2)] for pair in zip(first, second, strict=True)), None
        value, parent = numbers.choice(best)
        certain = numbers.randrange(len(space))
        changes = [place == certain or numbers.random() < self.mutation for place in range(len(space))]
        genes = zip(space, parent, changes, strict=True)
        return tuple(gene.changed(old, length, numbers) if change else old for gene, old, change in genes), value
