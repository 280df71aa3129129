"""Merge methods make one delta of the deltas that several experts have for one weight.

`method.py` is the contract; open it first, then `average.py` and `ties.py`. `chunks.py` lets a rule work entry by
entry, `prune.py` and `consensus.py` hold the steps that several methods share. Each method is imported here once; the
imports are the catalogue of `modular-experts methods` and of names such as `modular_experts.TIES`.
`modular_experts.merger` applies methods to stored experts.
"""

# ruff: noqa: F401 - `METHODS` finds what is imported here

from __future__ import annotations

from modular_experts.methods.average import Average, SparseAverage, TaskArithmetic
from modular_experts.methods.breadcrumbs import Breadcrumbs, BreadcrumbsTIES
from modular_experts.methods.core_space import CoreSpace
from modular_experts.methods.ctm import CtM
from modular_experts.methods.dare import DARE, DARETIES
from modular_experts.methods.della import DELLA, DELLALinear
from modular_experts.methods.emr import EMR
from modular_experts.methods.esm import ESM
from modular_experts.methods.fisher import Fisher
from modular_experts.methods.iso_c import IsoC, IsoCTS
from modular_experts.methods.karcher import Karcher
from modular_experts.methods.knots import KnOTS
from modular_experts.methods.lines import LiNeS
from modular_experts.methods.mag_max import MagMax
from modular_experts.methods.method import MergeMethod
from modular_experts.methods.model_stock import ModelStock
from modular_experts.methods.pcb import PCB
from modular_experts.methods.ram import RAM, RAMPlus
from modular_experts.methods.reg_mean import RegMean, RegMeanPlusPlus, SelfRegMean
from modular_experts.methods.rescaled import Rescaled
from modular_experts.methods.sce import SCE
from modular_experts.methods.set_operations import Difference, Intersection
from modular_experts.methods.slerp import SLERP, MultiSLERP, NuSLERP
from modular_experts.methods.svc import SVC
from modular_experts.methods.svd_average import SVDAverage
from modular_experts.methods.tall_mask import ConsensusTA, TALLMask
from modular_experts.methods.ties import TIES, MagnitudePrune
from modular_experts.methods.tsv_merge import TSVMerge
from modular_experts.methods.wudi import WUDI
from modular_experts.text import did_you_mean

METHODS: dict[str, type[MergeMethod]] = {
    name: kind
    for name, kind in sorted(globals().items())
    if isinstance(kind, type) and issubclass(kind, MergeMethod) and kind is not MergeMethod
}
"""Every method of the package by its name."""

__all__ = ["MergeMethod", *METHODS]


def method_named(name: str) -> MergeMethod:
    """Return a method of the package with its default settings.

    Raises:
        ValueError: There is no such method.
    """
    if name not in METHODS:
        hint = did_you_mean(name, METHODS) or f"; the methods are {', '.join(METHODS)}"
        raise ValueError(f"there is no merge method {name!r}{hint}")
    return METHODS[name]()
