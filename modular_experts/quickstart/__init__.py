"""Train a small base on the generated suite, and do a study of experts of four kinds and their merges.

`plan.py` holds the settings of the study, `base.py` trains the base, and `run.py` does both. The results, the table and
the page are those of any study.
"""

from modular_experts.quickstart.plan import Plan
from modular_experts.quickstart.run import TimeLeft, run_plan

__all__ = ["Plan", "TimeLeft", "run_plan"]
