"""Hold everything that a study does as plain values, and the groups of experts that its merges are made of."""

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from modular_experts.base.base import DType
from modular_experts.library import StoredExpert, open_expert
from modular_experts.library.described import trusted
from modular_experts.study.short_forms import Settings, for_seed

MULTITASK = "multitask"
BASE = "base"
SINGLE = ", single"
"""What stands after a kind where its single experts are meant, each on its own task."""
Measure = Callable[[Sequence[StoredExpert]], Sequence[float]]


@dataclass(frozen=True)
class Study:
    """Everything that a study does, as plain values; `Description` explains the other attributes.

    Attributes:
        held_in: Settings of the tasks that get experts, by name.
        held_out: Settings of the tasks that are only tested, by name.
        experts: For each kind with an expert for each task the configs of its fit, of which a later one wins.
        merges: For each kind of expert its merges, routes and ensembles (`study/merges.py`).
        counts: How many experts are merged, in ascending order.
        draws: For each count whose groups are random, how many there are; the groups of other counts are disjoint.
        joint: The configs of the fit of each kind with one expert of all held-in tasks.
        base_shots: Numbers of demonstrations behind which the base is also tested.
    """

    base: str
    held_in: dict[str, Settings]
    held_out: dict[str, Settings]
    experts: dict[str, list[Settings]]
    merges: dict[str, tuple[Any, ...]]
    counts: tuple[int, ...]
    joint: dict[str, list[Settings]]
    matrix: bool
    seeds: tuple[int, ...]
    data: Settings
    max_new_tokens: int
    dtype: DType
    metrics: dict[str, Any] = field(default_factory=dict)
    measures: dict[str, str] = field(default_factory=dict)
    draws: dict[int, int] = field(default_factory=dict)
    base_shots: tuple[int, ...] = ()
    trust: tuple[str, ...] = field(default_factory=trusted)
    """Modules and classes that pieces trust in their processes, as this process does (`library/described.py`)."""

    @property
    def tasks(self) -> dict[str, Settings]:
        """Settings of all tasks by name, those that get experts first."""
        return {**self.held_in, **self.held_out}

    def at(self, seed: int) -> "Study":
        """Return the study of a seed, which stands in the place of `{seed}`."""
        parts = {name: getattr(self, name) for name in ("base", "held_in", "held_out", "experts", "joint")}
        filled = {name: for_seed(part, seed) for name, part in parts.items()}
        return self if filled == parts else replace(self, **filled)

    def settings_of(self, tasks: Iterable[str]) -> list[Settings]:
        """Return the settings of tasks, which name their files: all that a result on these tasks depends on."""
        by_name = self.tasks
        return [by_name[task] for task in tasks]

    def name(self, kind: str, task: str, seed: int) -> str:
        """Return the name of an expert in the library."""
        return self.joint_name(f"{kind}-{task}", seed)

    def combined_name(self, way: str, kind: str, name: str, seed: int) -> str:
        """Return the name in the library of the merge or the route (the `way`) of all experts of a kind."""
        return self.joint_name(f"{way}-{kind}-{slug(name)}", seed)

    def joint_name(self, kind: str, seed: int) -> str:
        """Return the name in the library of an expert of all tasks."""
        return f"{kind}-seed{seed}" if len(self.seeds) > 1 else kind


def base_name(shots: int) -> str:
    """Return how tables name the base behind some demonstrations."""
    return f"{BASE}, {shots}-shot" if shots else BASE


def slug(name: str) -> str:
    """Return a name of a merge with the letters that a name in a library may have."""
    return re.sub("[^A-Za-z0-9._-]+", "-", name)


@dataclass(frozen=True)
class Group:
    """The experts of some held-in tasks (`own`) that are combined, and the tasks that the combination is `tested` on.

    It has a `number` among the groups of its size, and `is_whole` if these are all experts of the kind.
    """

    kind: str
    seed: int
    number: int
    own: Sequence[str]
    tested: Sequence[str]
    is_whole: bool

    def experts(self, study: Study, out: Path) -> list[StoredExpert]:
        """Open the experts in the library of a study."""
        return [open_expert(out / "library" / study.name(self.kind, task, self.seed)) for task in self.own]


def groups(study: Study, kind: str, count: int, seed: int) -> list[Group]:
    """Return the groups of `count` experts that are combined: disjoint ones, or as many random ones as the study wants.

    All kinds and methods share them. More draws add groups, and leave those before them as they are.
    """
    names = list(study.held_in)
    wanted = study.draws.get(count)
    if wanted:
        drawn: dict[tuple[int, ...], None] = {}
        draw = random.Random(f"draws/{count}/{seed}")
        while len(drawn) < wanted:
            drawn[tuple(sorted(draw.sample(range(len(names)), count)))] = None
        members = [[names[place] for place in places] for places in drawn]
    else:
        random.Random(f"groups/{seed}").shuffle(names)
        members = [names[start : start + count] for start in range(0, len(names) - count + 1, count)]
    is_whole = count == len(names)
    several = []
    for number, own in enumerate(members):
        tested = list(study.held_in) if study.matrix else list(own)
        # Held-out tasks judge what all experts together have become.
        if study.matrix or is_whole:
            tested += study.held_out
        several.append(Group(kind, seed, number, own, tested, is_whole))
    return several
