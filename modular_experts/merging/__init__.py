"""Merging: many deltas of one weight in, one delta out. One method per file; `dir(modular_experts.merging)` lists
them.
"""

from modular_experts.merging.average import Average
from modular_experts.merging.breadcrumbs import Breadcrumbs
from modular_experts.merging.mag_max import MagMax
from modular_experts.merging.method import MergeMethod
from modular_experts.merging.model_stock import ModelStock
from modular_experts.merging.sparse_average import SparseAverage
from modular_experts.merging.task_arithmetic import TaskArithmetic
from modular_experts.merging.ties import TIES

__all__ = [
    "TIES",
    "Average",
    "Breadcrumbs",
    "MagMax",
    "MergeMethod",
    "ModelStock",
    "SparseAverage",
    "TaskArithmetic",
]
