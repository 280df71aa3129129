"""Choose on validation rows how experts are merged: the settings of a method (`tune`), or coefficients (`search`).

Open `tune.py` or `search.py` first; `objective.py` holds the losses of both and the choice of rows, which `statistics/`
uses too, and `combination.py` the model that the algorithms of `search` move.
"""

from modular_experts.tuning.combination import Combination
from modular_experts.tuning.gradient_search import ATLAS, AdaMerging
from modular_experts.tuning.objective import Objective, Trial, ValidationRows, objective_on_base
from modular_experts.tuning.search import CoefficientSearch, Found, Searched, search
from modular_experts.tuning.tune import Tuned, tune

__all__ = ["ATLAS", "AdaMerging", "CoefficientSearch", "Combination", "Found", "Objective", "Searched", "Trial"]
__all__ += ["Tuned", "ValidationRows", "objective_on_base", "search", "tune"]
