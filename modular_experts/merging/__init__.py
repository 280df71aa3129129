"""Merging: many deltas of one weight in, one delta out. One method per file; `dir(modular_experts.merging)` lists
them.
"""

from modular_experts.merging.average import Average
from modular_experts.merging.breadcrumbs import Breadcrumbs, BreadcrumbsTIES
from modular_experts.merging.dare import DARE, DARETIES
from modular_experts.merging.della import DELLA, DELLALinear
from modular_experts.merging.emr import EMR
from modular_experts.merging.fisher import Fisher
from modular_experts.merging.iso_c import IsoC
from modular_experts.merging.iso_cts import IsoCTS
from modular_experts.merging.karcher import Karcher
from modular_experts.merging.knots import KnOTS
from modular_experts.merging.mag_max import MagMax
from modular_experts.merging.magnitude_prune import MagnitudePrune
from modular_experts.merging.method import MergeMethod
from modular_experts.merging.model_stock import ModelStock
from modular_experts.merging.multi_slerp import MultiSLERP
from modular_experts.merging.nu_slerp import NuSLERP
from modular_experts.merging.pcb import PCB
from modular_experts.merging.ram import RAM, RAMPlus
from modular_experts.merging.reg_mean import RegMean
from modular_experts.merging.reg_mean_plus_plus import RegMeanPlusPlus
from modular_experts.merging.sce import SCE
from modular_experts.merging.self_reg_mean import SelfRegMean
from modular_experts.merging.slerp import SLERP
from modular_experts.merging.sparse_average import SparseAverage
from modular_experts.merging.supports import Difference, Intersection
from modular_experts.merging.svd_average import SVDAverage
from modular_experts.merging.tall_mask import ConsensusTA, TALLMask
from modular_experts.merging.task_arithmetic import TaskArithmetic
from modular_experts.merging.ties import TIES
from modular_experts.merging.tsv_merge import TSVMerge
from modular_experts.merging.wudi import WUDI

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
