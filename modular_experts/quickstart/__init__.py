"""The quickstart: a base, experts of four kinds and their merges on the generated suite, and a report of what was lost.

It is a user of the package like any other. `plan.py` says what is done, `base.py` and `work.py` do it, `run.py` sees
that all of it is done once, `report/` shows it.
"""

from modular_experts.quickstart.plan import Plan
from modular_experts.quickstart.report import check_drawing, draw, summary_sentences, summary_table, write_report
from modular_experts.quickstart.run import run_plan

__all__ = ["Plan", "check_drawing", "draw", "run_plan", "summary_sentences", "summary_table", "write_report"]
