"""Merge methods make one delta of the deltas that several experts have for one weight.

Open `method.py` first, the contract, then `average.py` and `ties.py`. `chunks.py` lets a rule work entry by entry,
`prune.py` and `election.py` hold steps that several methods share. The imports are the catalogue of `modular-experts
methods` and of names such as `modular_experts.TIES`.
"""

# ruff: noqa: F401 - `METHODS` finds what is imported here

from modular_experts.methods.average import Average, SparseAverage, TaskArithmetic
from modular_experts.methods.breadcrumbs import Breadcrumbs, BreadcrumbsTIES
from modular_experts.methods.coordinates import CoreSpace, CtM, KnOTS
from modular_experts.methods.distilled import Distilled
from modular_experts.methods.fisher import Fisher
from modular_experts.methods.karcher import Karcher
from modular_experts.methods.mag_max import MagMax
from modular_experts.methods.method import MergeMethod
from modular_experts.methods.model_stock import ModelStock
from modular_experts.methods.overlap import RAM, Difference, Intersection, RAMPlus
from modular_experts.methods.random_drops import DARE, DARETIES, DELLA, DELLALinear
from modular_experts.methods.reg_mean import RegMean, RegMeanPlusPlus, SelfRegMean
from modular_experts.methods.rescaled import SVC, LiNeS, Rescaled
from modular_experts.methods.sce import SCE
from modular_experts.methods.slerp import SLERP, MultiSLERP, NuSLERP
from modular_experts.methods.spectral import IsoC, IsoCTS, TSVMerge
from modular_experts.methods.task_masks import EMR, ConsensusTA, TALLMask
from modular_experts.methods.ties import TIES, MagnitudePrune
from modular_experts.methods.wudi import WUDI
from modular_experts.text import did_you_mean

METHODS: dict[str, type[MergeMethod]] = {
    name: kind
    for name, kind in sorted(globals().items())
    if isinstance(kind, type) and issubclass(kind, MergeMethod) and kind is not MergeMethod
}
"""Every method of the package by its name."""

FIRST: dict[str, tuple[str, ...]] = {
    "no data; any experts": ("SparseAverage", "TaskArithmetic", "TIES"),
    "no data; sparse or full experts": ("SelfRegMean",),
    "no data; LoRAs": ("IsoC", "TSVMerge", "Rescaled"),
    "inputs of each task": ("Distilled",),
    "labelled rows of each task": ("Fisher",),
    "no data; an expert for each task beside the merge": ("EMR",),
}
"""The methods that one should try first, by their needs."""

__all__ = ["MergeMethod", *METHODS]


def method_named(name: str) -> MergeMethod:
    """Return a method of the package with its default settings."""
    if name not in METHODS:
        hint = did_you_mean(name, METHODS) or f"; the methods are {', '.join(METHODS)}"
        raise ValueError(f"there is no merge method {name!r}{hint}")
    return METHODS[name]()
