"""A mask chooses which entries of a weight are trained, from a score of each.

A *score* (`scores.py`) ranks the entries of a weight; a *rule* (`rules.py`) turns scores into the kept units when
training starts and at later updates. `top_k.py` finds the highest scores. Open `scores.py` first.
"""

from modular_experts.masks.rules import GrowAndDrop, Reselect, Rule, SelectOnce
from modular_experts.masks.scores import (
    SNIP,
    ConnectionSensitivity,
    FisherInformation,
    GradientMagnitude,
    GradientStatistic,
    RandomScore,
    Score,
    WeightMagnitude,
)
from modular_experts.masks.top_k import kth_highest, top_k

__all__ = ["SNIP", "ConnectionSensitivity", "FisherInformation", "GradientMagnitude", "GradientStatistic"]
__all__ += ["GrowAndDrop", "RandomScore", "Reselect", "Rule", "Score", "SelectOnce", "WeightMagnitude", "kth_highest"]
__all__ += ["top_k"]
