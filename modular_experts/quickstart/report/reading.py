"""Reading: a run's results by name, and numbers as text. Figure, page and table read through here, so they agree.

What the numbers mean is said in `findings.py`. A run that was interrupted has no results to read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

__all__ = ["Reading", "listed", "number", "percent", "points", "share", "size", "times"]

KIND_NAMES = {"sparse": "sparse entries", "block": "sparse tiles", "lora": "LoRA", "full": "full"}
# As a sentence says them: `sparse-entry experts`, `the plain average of them`.
EXPERT_WORDS = {"sparse": "sparse-entry", "block": "sparse-tile", "lora": "LoRA", "full": "full"}
METHOD_WORDS = {
    "Average": "the plain average",
    "TaskArithmetic": "task arithmetic",
    "SparseAverage": "the overlap-aware average",
    "TIES": "TIES",
}
METHOD_NAMES = {
    "Average": "average",
    "TaskArithmetic": "task arithmetic",
    "SparseAverage": "overlap-aware",
    "TIES": "TIES",
}

# The paired difference that counts as noise on one seed, at this number of test words: 20 tasks of 48.
NOISE, NOISE_WORDS = 0.02, 960

At = Literal["chosen", "default"]
Role = Literal["held_in", "held_out"]
ROLE_NAMES: dict[Role, str] = {"held_in": "held-in", "held_out": "held-out"}


@dataclass(frozen=True)
class Reading:
    """Complete results of a quickstart run.

    Args:
        results: What `results.json` holds.
    """

    results: Mapping[str, Any]

    @property
    def kinds(self) -> list[str]:
        """Kinds of experts, in the order of `KIND_NAMES`: in the results, what was finished first comes first."""
        return [kind for kind in KIND_NAMES if kind in self.results["experts"]]

    @property
    def levels(self) -> list[int]:
        """How many experts are merged."""
        return list(self.results["levels"])

    @property
    def everything(self) -> int:
        """How many experts the largest merge has."""
        return self.levels[-1]

    @property
    def words_per_task(self) -> int:
        """How many words of a task are tested."""
        return next(iter(self.results["experts"][self.kinds[0]].values()))["rows"]

    def tasks(self, role: Role = "held_in") -> list[str]:
        """Return the names of the tasks that have a role."""
        return list(self.results["tasks" if role == "held_in" else "held_out"])

    def methods(self, kind: str) -> list[str]:
        """Return the methods by which experts of the kind were merged, in the order of `METHOD_NAMES`."""
        return [method for method in METHOD_NAMES if method in self.results["merges"][kind]]

    def single(self, kind: str, measure: str = "exact_match") -> float:
        """Return the mean over the single experts of a kind, each tested on its own task."""
        return mean([expert[measure] for expert in self.results["experts"][kind].values()])

    def merge(self, kind: str, method: str, level: int | None = None) -> Mapping[str, Any]:
        """Return all that is known of a merge; without a level, of that of all experts."""
        return self.results["merges"][kind][method][str(level or self.everything)]

    def merged(
        self, kind: str, method: str, role: Role = "held_in", at: At = "chosen", level: int | None = None
    ) -> float:
        """Return the exact match of a merge."""
        return self.merge(kind, method, level)[at][role]["exact_match"]

    def best(self, kind: str, role: Role = "held_in", at: At = "chosen", level: int | None = None) -> str:
        """Return the method with the highest exact match; of equals the first."""
        return max(self.methods(kind), key=lambda method: self.merged(kind, method, role, at, level))

    def best_of_all(self, role: Role = "held_in") -> tuple[str, str, float]:
        """Return the kind, the method and the exact match of the best merge of all experts at its chosen scale."""
        best = {kind: self.best(kind, role) for kind in self.kinds}
        kind = max(best, key=lambda kind: self.merged(kind, best[kind], role))
        return kind, best[kind], self.merged(kind, best[kind], role)

    def other(self, name: str, role: Role = "held_in") -> float:
        """Return the exact match of what is no expert: `plain` and `latent` are the base's, `multitask` is."""
        place = self.results[name] if name == "multitask" else self.results["base"][name]
        return place[role]["exact_match"]

    def noise(self, role: Role = "held_in") -> float:
        """Return the difference below which exact matches are level: 0.02, and more where fewer words are tested."""
        return NOISE * max(1.0, math.sqrt(NOISE_WORDS / (len(self.tasks(role)) * self.words_per_task)))


def mean(values: Sequence[float | None]) -> float:
    """Return the mean; of nothing, or with a number that is none, NaN."""
    return fmean(math.nan if value is None else value for value in values) if values else math.nan


def percent(share: float) -> str:
    """Return an exact match or Rouge-L in per cent, such as `55.6`."""
    return number(100 * share, 1)


def points(difference: float) -> str:
    """Return the size of a difference of two shares, such as `2.1 points`."""
    return f"{abs(100 * difference):.1f} points"


def share(value: float) -> str:
    """Return a share in per cent, such as `5 %` or `5.45 %`."""
    return f"{100 * value:.3g} %"


def number(value: float | None, digits: int) -> str:
    """Return a number with a fixed number of digits; one that is none as a dash."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def times(scale: float) -> str:
    """Return a factor, such as `×0.75`."""
    return f"\N{MULTIPLICATION SIGN}{scale:g}"


def size(count: float) -> str:
    """Return a size on disk, such as `240 kB` or `1.2 MB`."""
    return f"{count / 1e6:.1f} MB" if count >= 999_500 else f"{count / 1e3:.0f} kB"


def listed(words: Sequence[str]) -> str:
    """Return words as a sentence lists them: `a, b and c`."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
