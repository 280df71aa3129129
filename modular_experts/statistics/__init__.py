"""Measure the statistics of an expert's data for merge methods and routers, and store them beside the expert.

Open `take.py` first. Statistics use validation rows, because a merge must not be tested on rows that it was made from;
only prompts for routers take training rows too. `library/statistics.py` defines the files.
"""

from modular_experts.evaluation.gram import gram, merged_grams
from modular_experts.statistics.fisher import fisher
from modular_experts.statistics.take import KINDS, take_statistics

__all__ = ["KINDS", "fisher", "gram", "merged_grams", "take_statistics"]
