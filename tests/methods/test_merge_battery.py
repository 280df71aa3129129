"""The battery runs on every merge method of the package, with the promises of its docstring, and catches wrong ones."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import modular_experts.methods as m
from modular_experts.deltas import Delta, Dense, Sparse
from modular_experts.methods.chunks import weighted_sum
from modular_experts.testing.methods import check_merge_method

SAME = {"alone": True, "copies": True}
FULL = {**SAME, "order": True, "zero": True}
PROMISES = [
    (m.Average(), {**SAME, "order": True}),
    (m.SparseAverage(), FULL),
    (m.SparseAverage(exponent=0.5), {"alone": True, "order": True, "zero": True}),
    (m.TaskArithmetic(), {"alone": True, "order": True, "zero": True}),
    (m.RAM(), FULL),
    (m.RAMPlus(), {"order": True, "zero": True}),
    (m.ModelStock(), FULL),
    (m.ModelStock(row_wise=True), FULL),
    (m.ModelStock(preset="mergekit"), {**SAME, "order": True}),
    (m.SLERP(), SAME),
    (m.NuSLERP(), SAME),
    (m.NuSLERP(row_wise=True), SAME),
    (m.NuSLERP(preset="mergekit"), SAME),
    (m.MultiSLERP(), {**SAME, "order": True}),
    (m.Karcher(), {**SAME, "order": True}),
    (m.TIES(keep=1.0), FULL),
    (m.TIES(scope="global"), {"order": True, "zero": True}),
    (m.TIES(preset="mergekit"), {**SAME, "order": True, "zero": True}),
    (m.MagnitudePrune(), {"order": True, "zero": True}),
    (m.DARE(), {"zero": True}),
    (m.DARE(preset="mergekit", keep=0.5), {"zero": True}),
    (m.DARETIES(), {"zero": True}),
    (m.DELLA(), {"zero": True}),
    (m.DELLALinear(), {"zero": True}),
    (m.Breadcrumbs(), {"order": True, "zero": True}),
    (m.BreadcrumbsTIES(), {"order": True, "zero": True}),
    (m.MagMax(), {**SAME, "zero": True}),
    (m.SCE(), {**SAME, "order": True, "zero": True}),
    (m.ConsensusTA(agreement=1, threshold=0.0), {"alone": True, "order": True, "zero": True}),
    (m.TALLMask(), {"alone": True, "order": True, "zero": True}),
    (m.EMR(), FULL),
    (m.Intersection(), {**SAME, "order": True}),
    (m.Difference(), {"alone": True, "zero": True}),
    (m.TSVMerge(), {"order": True, "zero": True, "alone": True}),
    (m.IsoC(), {"order": True, "zero": True}),
    (m.IsoCTS(), {"order": True, "zero": True}),
    (m.KnOTS(inner=m.TIES(keep=1.0)), {"alone": True}),
    (m.CoreSpace(inner=m.SparseAverage()), FULL),
    (m.CtM(inner=m.SparseAverage()), FULL),
    (m.LiNeS(), FULL),
    (m.Rescaled(), {"alone": True, "order": True, "zero": True}),
    (m.WUDI(solver="exact"), {"alone": True, "order": True, "zero": True}),
    (m.SelfRegMean(), FULL),
    (m.SVC(), FULL),
    (m.SVC(inner=m.Fisher()), SAME),
    (m.Fisher(), SAME),
    (m.RegMean(), {"alone": True}),
    (m.RegMean(ridge=0.1), {"alone": True}),
    (m.RegMeanPlusPlus(), {"alone": True}),
]

# Methods of directions instead of entries: they merge sparse experts to a dense or low-rank one.
MADE_DENSE = {
    *("TSVMerge", "IsoC", "IsoCTS", "KnOTS", "WUDI", "SVC"),
    *("CtM", "SelfRegMean", "RegMean", "RegMeanPlusPlus"),
}


@pytest.mark.parametrize(("method", "promises"), PROMISES, ids=str)
def test_method_keeps_its_promises(method, promises):
    inner = getattr(method, "inner", method)
    kinds = {type(method).__name__, type(inner).__name__}
    check_merge_method(method, sparse=not kinds & MADE_DENSE, **promises)


def test_every_method_is_in_the_battery():
    formulas = {name for name, kind in m.METHODS.items() if not getattr(kind.needs, "inputs", False)}
    missing = formulas - {type(method).__name__ for method, _ in PROMISES}
    assert not missing, f"add a line to PROMISES in {__name__}.py with the promises of these methods: {sorted(missing)}"


@dataclass(frozen=True)
class Correct(m.MergeMethod):
    scale: float = 1.0

    def merge(self, deltas):
        return weighted_sum(deltas, [self.scale / len(deltas)] * len(deltas))


@dataclass(frozen=True)
class Changed(Correct):
    """Changes what is right."""

    change: Callable[[Delta], Any] = field(default=lambda merged: merged)

    def merge(self, deltas):
        return self.change(super().merge(deltas))


class Unscaled(Correct):
    def merge(self, deltas):
        return weighted_sum(deltas, [1.0] * len(deltas))


class InPlace(Correct):
    def merge(self, deltas):
        for delta in deltas:
            next(t for t in delta.tensors().values() if t.is_floating_point()).mul_(1.5)
        return super().merge(deltas)


class FirstOnly(Correct):
    def merge(self, deltas):
        return deltas[0] * self.scale if not deltas[0].is_empty else Sparse.zero(deltas[0].shape)


@pytest.mark.parametrize(
    ("method", "promises", "sentence"),
    [
        (InPlace(), {}, "must not change what it is given"),
        (Changed(change=lambda merged: Dense(merged.dense() + 1)), {}, "must merge to"),
        (Changed(change=lambda merged: merged.to(dtype=torch.bfloat16)), {}, "must have the widest dtype"),
        (Changed(change=lambda merged: Dense(merged.dense() / 0)), {}, "must be finite"),
        (Changed(change=lambda merged: merged.dense()), {}, "must return a delta"),
        (Unscaled(), {}, "the scale must be a factor"),
        (Changed(change=lambda merged: merged * torch.rand(()).item()), {}, "the same call must give the same result"),
        (Correct(), {"zero": True}, "an expert that moves nothing must change nothing"),
        (
            Changed(change=lambda merged: Dense(merged.dense())),
            {"sparse": True},
            "Sparse experts must merge to a Sparse one",
        ),
        (FirstOnly(), {"order": True}, "the order of the experts must not matter"),
        (m.TaskArithmetic(), FULL, "copies of an expert must merge to it"),
        (m.IsoC(), {"alone": True}, "one expert must merge to itself"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_methods_are_caught(method, promises, sentence):
    with pytest.raises(AssertionError, match=sentence):
        check_merge_method(method, **promises)


def test_right_method_of_a_user_passes():
    check_merge_method(Correct(), alone=True, copies=True, order=True)
