"""Where `training_for_merging` trains: ten tasks of the generated suite, or four real ones on a pretrained base.

A world states its experts of each kind, the learning rates to compare, and the merges.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from merge_worlds import HELD_IN, REAL_KINDS
from selection_worlds import Generated, OnBase, Real

from modular_experts.data import TaskMixture
from modular_experts.experts import SparseExpert
from modular_experts.methods import IsoC, MergeMethod, Rescaled, SelfRegMean, SparseAverage
from modular_experts.quickstart.plan import KINDS

__all__ = ["METHODS", "SPARSE", "RealTasks", "Suite", "World"]

SPARSE = ("sparse", "block", "row")
"""Kinds of which a schedule chooses the entries."""

METHODS: Mapping[str, MergeMethod] = {
    "SparseAverage": SparseAverage(),
    "SelfRegMean": SelfRegMean(),
    "IsoC": IsoC(),
    "TSVMerge, rescaled": Rescaled(),
}

SCALES: Mapping[tuple[str, bool], Sequence[float]] = {
    ("SparseAverage", True): (0.35, 0.5, 0.75, 1.0, 1.4, 2.0),
    ("SparseAverage", False): (1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
    ("SelfRegMean", True): (0.35, 0.5, 0.75, 1.0, 1.4),
    ("SelfRegMean", False): (0.2, 0.35, 0.5, 0.75, 1.0, 1.4),
    ("IsoC", True): (0.5, 0.75, 1.0, 1.4, 2.0, 3.0),
    ("IsoC", False): (0.5, 0.75, 1.0, 1.4, 2.0, 2.8, 4.0),
    ("TSVMerge, rescaled", False): (0.5, 0.75, 1.0, 1.4, 2.0),
}
"""Scales to try, by method and whether experts are sparse; each row holds 1, the method as it comes."""


class World(OnBase):
    """What is the same, or has a default, in both worlds.

    Attributes:
        experts: What makes the expert of a weight, by kind.
        rates: Learning rates to compare, by kind.
        references: Learning rate, by kind, at which shapes, batches and ways are compared.
        held_out: What is shown of held-out tasks, "exact_match" or "loss".
    """

    experts: ClassVar[Mapping[str, Callable[..., Any]]]
    rates: ClassVar[Mapping[str, Sequence[float]]]
    references: ClassVar[Mapping[str, float]]
    held_out: ClassVar[str]

    seed: int
    work: Path
    steps: int
    batch_size: int
    new_tokens: int

    def mixture(self, names: Sequence[str], held_out: bool = False) -> TaskMixture:
        raise NotImplementedError

    def methods(self, kind: str) -> list[str]:
        """Return the merges of a kind: IsoC, for want of time, is only for LoRAs, its best kind."""
        return ["SparseAverage", "SelfRegMean", *(["IsoC"] if kind == "lora" else [])]


@dataclass(frozen=True)
class Suite(Generated, World):
    """Ten tasks of the generated suite, trained as the quickstart trains them."""

    experts: ClassVar[Mapping[str, Callable[..., Any]]] = {name: kind.expert for name, kind in KINDS.items()} | {
        "row": partial(SparseExpert, keep_ratio=0.1, granularity="row")
    }
    rates: ClassVar[Mapping[str, Sequence[float]]] = {
        "sparse": (5e-4, 1e-3, 2e-3, 4e-3),
        "block": (1e-3, 2e-3, 4e-3),
        "row": (1e-3, 2e-3, 4e-3),
        "lora": (1.5e-3, 3e-3, 6e-3),
        "full": (3e-4, 5e-4, 1e-3),
    }
    references: ClassVar[Mapping[str, float]] = {"sparse": 1e-3, "block": 1e-3, "row": 1e-3, "lora": 3e-3, "full": 1e-3}
    held_out = "exact_match"


@dataclass(frozen=True)
class RealTasks(Real, World):
    """Four real tasks of different sorts and two held-out ones, trained as `merge_quality` trains fifteen."""

    work: Path = Path()
    steps = 75
    new_tokens = 32
    others = ("clinc_small_talk", "country_demonym")
    experts: ClassVar[Mapping[str, Callable[..., Any]]] = {name: kind.expert for name, kind in REAL_KINDS.items()} | {
        "row": partial(SparseExpert, keep_ratio=0.05, granularity="row")
    }
    rates: ClassVar[Mapping[str, Sequence[float]]] = {
        "sparse": (3e-4, 1e-3, 2e-3),
        "block": (1e-3, 2e-3),
        "row": (5e-4, 1e-3, 2e-3),
        "lora": (1e-3, 3e-3, 5e-3),
        "full": (1e-4, 3e-4),
    }
    references: ClassVar[Mapping[str, float]] = {"sparse": 1e-3, "block": 1e-3, "row": 1e-3, "lora": 3e-3, "full": 1e-4}
    dtype = "bfloat16"
    held_out = "loss"

    @property
    def tasks(self) -> list[str]:
        return HELD_IN[:4]

    def methods(self, kind: str) -> list[str]:
        """Return the merges of a kind: without SelfRegMean for LoRAs, which it fits badly as it comes."""
        return ["SparseAverage", *(["IsoC", "TSVMerge, rescaled"] if kind == "lora" else ["SelfRegMean"])]
