"""Statistics: what merge methods ask of an expert's data, taken on validation rows and stored beside the expert.

Test rows are never looked at, so that a merge is not measured on what it was made from.
"""

from __future__ import annotations

from modular_experts.statistics.fisher import fisher
from modular_experts.statistics.gram import gram
from modular_experts.statistics.merged_gram import merged_grams
from modular_experts.statistics.take import KINDS, take_statistics

__all__ = ["KINDS", "fisher", "gram", "merged_grams", "take_statistics"]
