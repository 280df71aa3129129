"""The ways to choose what is trained that `selection_quality` compares: expert, schedule and learning rates of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from modular_experts.experts import FullExpert, LoRAExpert, MaskedExpert, SparseExpert
from modular_experts.experts.selectable import Granularity
from modular_experts.masks import (
    SNIP,
    ChangeMagnitude,
    ConnectionSensitivity,
    DenseThenSparse,
    FisherInformation,
    GraSP,
    GrowAndDrop,
    RandomScore,
    Reselect,
    SelectOnce,
    WeightMagnitude,
)

__all__ = ["REAL", "REFERENCE", "VARIANTS", "Variant"]

REFERENCE = "entries 5 %: grow and drop, |g|"


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        part: The question that it belongs to.
        expert: Makes the expert for a weight.
        schedule: Settings of `MaskSchedule`; none for experts that choose nothing.
        rates: Learning rates that are tried; the better one counts.
        real_rate: The learning rate on a pretrained base.
        neighbours: What earlier experts mean to the next: nothing, `exclude`, a penalty, or one support for all.
    """

    part: str
    expert: Callable[..., Any]
    schedule: dict[str, Any] | None = None
    rates: tuple[float, ...] = (1e-3, 4e-3)
    neighbours: str | float | None = None
    real_rate: float = 2e-3


def _sparse(keep: float = 0.05, granularity: Granularity = "element", size: int = 8) -> Callable[..., Any]:
    return partial(SparseExpert, keep_ratio=keep, granularity=granularity, block_size=size)


def _masked(keep: float = 0.05) -> Callable[..., Any]:
    return partial(MaskedExpert, keep_ratio=keep)


ONCE, GROW, PAPER = SelectOnce(), GrowAndDrop(), Reselect(every=6, until=0.25)
SIGNED, NEGATIVE, ABSOLUTE = (ConnectionSensitivity(sign) for sign in ("signed", "negative", "absolute"))

VARIANTS: dict[str, Variant] = {
    REFERENCE: Variant("scores", _sparse(), {"rule": GROW}),
    "entries 5 %: once, |g|": Variant("scores", _sparse(), {"rule": ONCE}),
    "entries 5 %: once, SNIP": Variant("scores", _sparse(), {"rule": ONCE, "score": SNIP()}),
    "entries 5 %: once, Fisher": Variant(
        "scores", _sparse(), {"rule": ONCE, "score": FisherInformation(), "batches": 4}
    ),
    "entries 5 %: once, GraSP": Variant("scores", _sparse(), {"rule": ONCE, "score": GraSP()}),
    "entries 5 %: once, largest |w|": Variant("scores", _sparse(), {"rule": ONCE, "score": WeightMagnitude()}),
    "entries 5 %: once, smallest |w|": Variant("scores", _sparse(), {"rule": ONCE, "score": WeightMagnitude(True)}),
    "entries 5 %: once, random": Variant("scores", _sparse(), {"rule": ONCE, "score": RandomScore()}),
    "entries 5 %: dense first, D g (paper)": Variant("scores", _masked(), {"rule": PAPER, "score": SIGNED}),
    "entries 5 %: dense first, -D g": Variant("scores", _masked(), {"rule": PAPER, "score": NEGATIVE}),
    "entries 5 %: dense first, |D g|": Variant("scores", _masked(), {"rule": PAPER, "score": ABSOLUTE}),
    "entries 5 %: LT-SFT": Variant(
        "schedules", _masked(), {"rule": DenseThenSparse(dense=0.5, rewind=True), "score": ChangeMagnitude()}
    ),
    "entries 5 %: dense, then |D|": Variant(
        "schedules", _masked(), {"rule": DenseThenSparse(dense=0.5), "score": ChangeMagnitude()}
    ),
    "entries 5 %: grow and drop, SNIP": Variant("schedules", _sparse(), {"rule": GROW, "score": SNIP()}),
    "entries 5 %: grow and drop, Fisher": Variant(
        "schedules", _sparse(), {"rule": GROW, "score": FisherInformation(), "batches": 4}
    ),
    "entries 5 %: grow and drop, |g|, 4 batches": Variant("schedules", _sparse(), {"rule": GROW, "batches": 4}),
    "entries 5 %: grow and drop, |g|, from the steps": Variant("steps", _sparse(), {"rule": GROW, "batches": "step"}),
    "entries 5 %: grow and drop every 3, |g|, from the steps": Variant(
        "steps", _sparse(), {"rule": GrowAndDrop(every=3), "batches": "step"}
    ),
    "entries 5 %: grow and drop half, |g|, from the steps": Variant(
        "steps", _sparse(), {"rule": GrowAndDrop(replace=0.5), "batches": "step"}
    ),
    "entries 5 %: grow and drop to the end": Variant("schedules", _sparse(), {"rule": GrowAndDrop(until=1.0)}),
    "entries 5 %: grow and drop, stash": Variant("schedules", _sparse(), {"rule": GROW, "leavers": "stash"}),
    "entries 5 %: |g| anew every 5 steps": Variant("schedules", _sparse(), {"rule": Reselect(every=5, until=0.5)}),
    "entries 5 %: grow and drop, all weights together": Variant("scope", _sparse(), {"rule": GROW, "scope": "global"}),
    "entries 5 %: grow and drop, per block": Variant("scope", _sparse(), {"rule": GROW, "scope": "block"}),
    "entries 5 %: once, |g|, all weights together": Variant("scope", _sparse(), {"rule": ONCE, "scope": "global"}),
    "entries 1 %: grow and drop, |g|": Variant("ratios", _sparse(0.01), {"rule": GROW}, (4e-3, 1e-2)),
    "entries 1 %: once, |g|": Variant("ratios", _sparse(0.01), {"rule": ONCE}, (4e-3, 1e-2)),
    "entries 1 %: once, random": Variant("ratios", _sparse(0.01), {"rule": ONCE, "score": RandomScore()}, (4e-3, 1e-2)),
    "entries 1 %: dense first, D g (paper)": Variant(
        "ratios", _masked(0.01), {"rule": PAPER, "score": SIGNED}, (4e-3, 1e-2)
    ),
    "entries 10 %: grow and drop, |g|": Variant("ratios", _sparse(0.1), {"rule": GROW}, (1e-3, 3e-3)),
    "entries 10 %: once, |g|": Variant("ratios", _sparse(0.1), {"rule": ONCE}, (1e-3, 3e-3)),
    "entries 10 %: once, random": Variant("ratios", _sparse(0.1), {"rule": ONCE, "score": RandomScore()}, (1e-3, 3e-3)),
    "entries 10 %: dense first, D g (paper)": Variant(
        "ratios", _masked(0.1), {"rule": PAPER, "score": SIGNED}, (1e-3, 3e-3)
    ),
    "entries 20 %: grow and drop, |g|": Variant("ratios", _sparse(0.2), {"rule": GROW}, (1e-3, 3e-3)),
    "tiles 8, 5 %: grow and drop, |g|": Variant("granularity", _sparse(0.05, "block"), {"rule": GROW}),
    "tiles 8, 5 %: once, |g|": Variant("granularity", _sparse(0.05, "block"), {"rule": ONCE}),
    "tiles 8, 5 %: once, |g|, norm": Variant(
        "granularity", _sparse(0.05, "block"), {"rule": ONCE, "block_score": "norm"}
    ),
    "tiles 8, 5 %: once, random": Variant(
        "granularity", _sparse(0.05, "block"), {"rule": ONCE, "score": RandomScore()}
    ),
    "tiles 16, 5 %: grow and drop, |g|": Variant("granularity", _sparse(0.05, "block", 16), {"rule": GROW}),
    "rows, 5 %: grow and drop, |g|": Variant("granularity", _sparse(0.05, "row"), {"rule": GROW}),
    "rows, 5 %: once, |g|": Variant("granularity", _sparse(0.05, "row"), {"rule": ONCE}),
    "columns, 5 %: grow and drop, |g|": Variant("granularity", _sparse(0.05, "column"), {"rule": GROW}),
    "columns, 5 %: once, |g|": Variant("granularity", _sparse(0.05, "column"), {"rule": ONCE}),
    "entries 5 %: grow and drop, |g|, apart": Variant("neighbours", _sparse(), {"rule": GROW}, neighbours="exclude"),
    "entries 5 %: grow and drop, |g|, penalty 1": Variant("neighbours", _sparse(), {"rule": GROW}, neighbours=1.0),
    "entries 5 %: one support for all": Variant("neighbours", _sparse(), {}, neighbours="share"),
    "LoRA, rank 4": Variant("others", partial(LoRAExpert, rank=4, alpha=8.0), None, (1e-3, 3e-3, 1e-2), real_rate=3e-3),
    "full": Variant("others", FullExpert, None, (3e-4, 1e-3, 3e-3), real_rate=3e-4),
}

REAL = [
    "entries 5 %: once, |g|",
    "entries 5 %: once, random",
    "LoRA, rank 4",
    "full",
]
"""What is compared on a pretrained base, beside the reference, unless `--parts` says otherwise."""
