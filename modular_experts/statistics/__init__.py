"""Measure what some merge methods need of an expert's data, and store it beside the expert.

`take.py` conducts it; open it first. `gram.py`, `fisher.py` and `merged_gram.py` each measure one kind. Statistics use
validation rows only: a merge must not be tested on rows that it was made from. The files are `library/statistics.py`'s.
"""

from __future__ import annotations

from modular_experts.statistics.fisher import fisher
from modular_experts.statistics.gram import gram
from modular_experts.statistics.merged_gram import merged_grams
from modular_experts.statistics.take import KINDS, take_statistics

__all__ = ["KINDS", "fisher", "gram", "merged_grams", "take_statistics"]
