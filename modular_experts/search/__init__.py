"""Search: what is chosen on validation rows before experts are merged - the settings of a method, or coefficients."""

from __future__ import annotations

from modular_experts.search.ada_merging import AdaMerging
from modular_experts.search.atlas import ATLAS
from modular_experts.search.combination import Combination
from modular_experts.search.lora_hub import LoRAHub
from modular_experts.search.objective import Objective, Trial, objective_on_base
from modular_experts.search.search import CoefficientSearch, Found
from modular_experts.search.tune import Tuned, Tuning, tune

__all__ = [
    "ATLAS",
    "AdaMerging",
    "CoefficientSearch",
    "Combination",
    "Found",
    "LoRAHub",
    "Objective",
    "Trial",
    "Tuned",
    "Tuning",
    "objective_on_base",
    "tune",
]
