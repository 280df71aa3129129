"""Merging: many deltas of one weight in, one delta out. One method per file; `dir(modular_experts.methods)` lists
them.
"""

from modular_experts.methods.average import Average, SparseAverage, TaskArithmetic
from modular_experts.methods.breadcrumbs import Breadcrumbs, BreadcrumbsTIES
from modular_experts.methods.dare import DARE, DARETIES
from modular_experts.methods.della import DELLA, DELLALinear
from modular_experts.methods.emr import EMR
from modular_experts.methods.fisher import Fisher
from modular_experts.methods.iso_c import IsoC, IsoCTS
from modular_experts.methods.karcher import Karcher
from modular_experts.methods.knots import KnOTS
from modular_experts.methods.mag_max import MagMax
from modular_experts.methods.method import MergeMethod
from modular_experts.methods.model_stock import ModelStock
from modular_experts.methods.pcb import PCB
from modular_experts.methods.ram import RAM, RAMPlus
from modular_experts.methods.reg_mean import RegMean, RegMeanPlusPlus, SelfRegMean
from modular_experts.methods.sce import SCE
from modular_experts.methods.set_operations import Difference, Intersection
from modular_experts.methods.slerp import SLERP, MultiSLERP, NuSLERP
from modular_experts.methods.svd_average import SVDAverage
from modular_experts.methods.tall_mask import ConsensusTA, TALLMask
from modular_experts.methods.ties import TIES, MagnitudePrune
from modular_experts.methods.tsv_merge import TSVMerge
from modular_experts.methods.wudi import WUDI

__all__ = [
    "DARE",
    "DARETIES",
    "DELLA",
    "EMR",
    "PCB",
    "RAM",
    "SCE",
    "SLERP",
    "TIES",
    "WUDI",
    "Average",
    "Breadcrumbs",
    "BreadcrumbsTIES",
    "ConsensusTA",
    "DELLALinear",
    "Difference",
    "Fisher",
    "Intersection",
    "IsoC",
    "IsoCTS",
    "Karcher",
    "KnOTS",
    "MagMax",
    "MagnitudePrune",
    "MergeMethod",
    "ModelStock",
    "MultiSLERP",
    "NuSLERP",
    "RAMPlus",
    "RegMean",
    "RegMeanPlusPlus",
    "SVDAverage",
    "SelfRegMean",
    "SparseAverage",
    "TALLMask",
    "TSVMerge",
    "TaskArithmetic",
]
