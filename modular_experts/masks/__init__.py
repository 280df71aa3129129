"""Masks: which entries of a weight are trained. Scores in, indices out; no module is touched here.

A *score* ranks the entries of a weight, a *rule* turns scores into the kept units when training starts and at later
updates. Both are small values, named by class in a config; a score may also be a plain function.
"""

from modular_experts.masks.rules import DenseThenSparse, GrowAndDrop, Reselect, Rule, SelectOnce
from modular_experts.masks.scores import (
    SNIP,
    ChangeMagnitude,
    ConnectionSensitivity,
    FisherInformation,
    GradientMagnitude,
    GradientStatistic,
    GraSP,
    RandomScore,
    Score,
    WeightMagnitude,
)
from modular_experts.masks.top_k import StreamingTopK, kth_highest, top_k

__all__ = [
    "SNIP",
    "ChangeMagnitude",
    "ConnectionSensitivity",
    "DenseThenSparse",
    "FisherInformation",
    "GraSP",
    "GradientMagnitude",
    "GradientStatistic",
    "GrowAndDrop",
    "RandomScore",
    "Reselect",
    "Rule",
    "Score",
    "SelectOnce",
    "StreamingTopK",
    "WeightMagnitude",
    "kth_highest",
    "top_k",
]
