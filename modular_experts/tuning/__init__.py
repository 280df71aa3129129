"""Search: what is chosen on validation rows before experts are merged - the settings of a method, or coefficients."""

from __future__ import annotations

from modular_experts.tuning.coefficient_search import CoefficientSearch, Found
from modular_experts.tuning.combination import Combination
from modular_experts.tuning.gradient_search import ATLAS, AdaMerging
from modular_experts.tuning.lora_hub import LoRAHub
from modular_experts.tuning.objective import Objective, Trial, objective_on_base
from modular_experts.tuning.tune import Tuned, Tuning, tune

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
