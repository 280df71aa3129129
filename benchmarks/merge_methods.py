"""The methods that `merge_quality` compares, and what is tuned of each beside its scale (and its exponent)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from modular_experts import methods as m
from modular_experts.deltas import Delta
from modular_experts.methods.wrapper import Back, Wrapper
from modular_experts.tuning import ATLAS, AdaMerging, CoefficientSearch, LoRAHub

__all__ = ["METHODS", "REFERENCE", "Way"]

REFERENCE = "SparseAverage"


@dataclass(frozen=True)
class Way:
    """A way to merge.

    Attributes:
        method: The method with its default settings, unless a search finds coefficients for a sum.
        grid: Values to try of settings other than scale and exponent.
        search: The search, if there is no method.
        merges: Merges of the experts that the search has before the experts.
        labels: Whether it learns from the targets of the `rows`, or from the answers of the `experts` to their inputs.
        training_rows: Rows of a task that it learns from, of those that the experts were trained on, and how many a
            step takes; by default it learns from as many validation rows as the world says.
    """

    method: m.MergeMethod = field(default_factory=m.TaskArithmetic)
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    search: CoefficientSearch | None = None
    merges: Sequence[m.MergeMethod] = ()
    labels: Literal["rows", "experts"] = "rows"
    training_rows: tuple[int, int] | None = None

    @property
    def statistics(self) -> set[str]:
        """The kinds of statistics that the experts need."""
        return {kind for method in (self.method, *self.merges) if (kind := method.needs.statistics)}


@dataclass(frozen=True)
class Truncated(Wrapper):
    """The merge of another method, truncated to a rank, as `export --rank` does it."""

    inner: m.MergeMethod = field(default_factory=m.TaskArithmetic)
    scale: float = 1.0
    rank: int = 4

    def around(self, deltas: Sequence[Delta]) -> tuple[Sequence[Delta], Back]:
        return deltas, lambda merged: m.SVDAverage(self.rank, self.scale).merge([merged])


KEEP = {"keep": [0.01, 0.02, 0.05, 0.1, 0.2, 0.5]}
INNER_KEEP = {"inner.keep": [0.1, 0.2, 0.5, 1.0]}
DEPTHS = {"last": [0.5, 1.0, 1.5, 2.0, 3.0, 4.0]}

REG_MEAN = [m.RegMean(reduce=1.0, ridge=0.01), m.SparseAverage()]
DATA_FREE = [m.SelfRegMean(), m.SparseAverage()]
FLAT = [m.SelfRegMean(flatten=0.5)]
ROWS = ATLAS(per="row", steps=80, learning_rate=0.02, decay=True)

METHODS: dict[str, Way] = {
    "Average": Way(m.Average()),
    "SparseAverage": Way(m.SparseAverage()),
    "TaskArithmetic": Way(m.TaskArithmetic()),
    "SLERP": Way(m.SLERP()),
    "NuSLERP": Way(m.NuSLERP()),
    "MultiSLERP": Way(m.MultiSLERP()),
    "Karcher": Way(m.Karcher()),
    "ModelStock": Way(m.ModelStock()),
    "TIES": Way(m.TIES(), KEEP),
    "DARE": Way(m.DARE(), {"keep": [0.1, 0.5, 0.9]}),
    "DARETIES": Way(m.DARETIES(), {"keep": [0.1, 0.5, 0.9]}),
    "DELLA": Way(m.DELLA(), {"keep": [0.2, 0.5, 0.8]}),
    "DELLALinear": Way(m.DELLALinear(), {"keep": [0.2, 0.5, 0.8]}),
    "Breadcrumbs": Way(m.Breadcrumbs(), {"beta": [0.5, 0.9], "gamma": [0.0, 0.001, 0.01]}),
    "BreadcrumbsTIES": Way(m.BreadcrumbsTIES(), {"beta": [0.5, 0.9], "gamma": [0.0, 0.001, 0.01]}),
    "MagnitudePrune": Way(m.MagnitudePrune(), KEEP),
    "MagMax": Way(m.MagMax()),
    "EMR (shared)": Way(m.EMR()),
    "ConsensusTA": Way(m.ConsensusTA(), {"threshold": [0.1, 0.2, 0.4], "agreement": [1, 2]}),
    "SCE": Way(m.SCE(), {"keep": [0.1, 0.5, 1.0]}),
    "RAM": Way(m.RAM(), {"epsilon": [0.0, 1e-4, 1e-3]}),
    "RAM+": Way(m.RAMPlus(), {"epsilon": [0.0, 1e-4, 1e-3]}),
    "PCB": Way(m.PCB(), {"keep": [0.05, 0.1, 0.3]}),
    "TSVMerge": Way(m.TSVMerge()),
    "TSVMerge, rescaled": Way(m.Rescaled()),
    "SelfRegMean, rescaled": Way(m.Rescaled(m.SelfRegMean())),
    "IsoC": Way(m.IsoC()),
    "IsoCTS": Way(m.IsoCTS(), {"common": [0.5, 0.8, 0.95]}),
    "KnOTS": Way(m.KnOTS()),
    "Core Space, TIES": Way(m.CoreSpace()),
    "TaskArithmetic, truncated to rank 4": Way(Truncated()),
    "CtM of TaskArithmetic, rank 4": Way(m.CtM(m.TaskArithmetic(), rank=4)),
    "TIES, truncated to rank 4": Way(Truncated(m.TIES()), INNER_KEEP),
    "CtM of TIES, rank 4": Way(m.CtM(m.TIES(), rank=4), INNER_KEEP),
    "CtM of IsoC, rank 4": Way(m.CtM(m.IsoC(), rank=4)),
    "SVDAverage": Way(m.SVDAverage(), {"rank": [1, 2, 4, 8, 16]}),
    "WUDI": Way(m.WUDI()),
    "WUDI, exact": Way(m.WUDI(solver="exact")),
    "SVC of SparseAverage": Way(m.SVC(), {"alpha": [0.25, 0.5, 1.0]}),
    "SelfRegMean": Way(m.SelfRegMean(), {"ridge": [0.03, 0.1, 0.3]}),
    "SelfRegMean, flat": Way(m.SelfRegMean(flatten=0.5), {"ridge": [0.03, 0.1, 0.3]}),
    "SparseAverage, LiNeS": Way(m.LiNeS(), {"inner.exponent": [0.0, 1.0], **DEPTHS}),
    "SelfRegMean, LiNeS": Way(m.LiNeS(m.SelfRegMean()), DEPTHS),
    "IsoC, LiNeS": Way(m.LiNeS(m.IsoC()), DEPTHS),
    "Fisher": Way(m.Fisher()),
    "ESM": Way(m.ESM(), {"power": [0.0, 0.15, 0.5]}),
    "RegMean": Way(m.RegMean(), {"reduce": [0.9, 0.99, 1.0]}),
    "RegMean, ridge": Way(m.RegMean(reduce=1.0, ridge=0.03), {"ridge": [0.003, 0.01, 0.03]}),
    "RegMean++": Way(m.RegMeanPlusPlus()),
    "AdaMerging": Way(search=AdaMerging(steps=60, learning_rate=1e-2, start=0.1)),
    "AdaMerging, loss": Way(search=AdaMerging(steps=150, learning_rate=1e-2, start=0.1, objective="loss")),
    "aTLAS": Way(search=ATLAS()),
    "aTLAS, from SparseAverage": Way(search=ATLAS(), merges=[m.SparseAverage()]),
    "aTLAS, from RegMean": Way(search=ATLAS(), merges=REG_MEAN),
    "aTLAS, from SelfRegMean": Way(search=ATLAS(), merges=DATA_FREE),
    "aTLAS, from SelfRegMean, experts' answers": Way(search=ATLAS(), merges=DATA_FREE, labels="experts"),
    "aTLAS, from SelfRegMean, distilled": Way(search=ATLAS(objective="distill"), merges=DATA_FREE, labels="experts"),
    "aTLAS, from RegMean, experts' answers": Way(search=ATLAS(), merges=REG_MEAN, labels="experts"),
    "aTLAS, from RegMean, distilled": Way(search=ATLAS(objective="distill"), merges=REG_MEAN, labels="experts"),
    "aTLAS, from flat SelfRegMean": Way(search=ATLAS(), merges=FLAT),
    "aTLAS, from flat SelfRegMean, experts' answers": Way(search=ATLAS(), merges=FLAT, labels="experts"),
    "aTLAS, from flat SelfRegMean, distilled": Way(search=ATLAS(objective="distill"), merges=FLAT, labels="experts"),
    "aTLAS by row": Way(search=ROWS, merges=FLAT, training_rows=(320, 4)),
    "aTLAS by row, from RegMean": Way(search=ROWS, merges=REG_MEAN, training_rows=(320, 4)),
    "aTLAS by row, from RegMean, distilled": Way(
        search=replace(ROWS, objective="distill"), merges=REG_MEAN, labels="experts", training_rows=(320, 4)
    ),
    "aTLAS by row, from IsoC": Way(search=ROWS, merges=[m.IsoC(scale=2.0)], training_rows=(320, 4)),
    "aTLAS by row, distilled": Way(
        search=replace(ROWS, objective="distill"), merges=FLAT, labels="experts", training_rows=(320, 4)
    ),
    "LoRAHub": Way(search=LoRAHub(steps=100)),
}
