"""Train a small base on the generated suite, and do a study of experts of four kinds and their merges.

`plan.py` holds the settings of the study; `run.py` trains the base and runs the study, which makes the results, the
table and the page.
"""

from modular_experts.quickstart.plan import Plan
from modular_experts.quickstart.run import prepare_base, run_plan

__all__ = ["Plan", "prepare_base", "run_plan"]
