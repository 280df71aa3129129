"""Train a base and experts of four kinds on the generated suite, merge the experts, and report what that loses.

The quickstart is a user of the package like any other. `plan.py` lists the work, `base.py` and `work.py` do a piece of
it, and `run.py` all of it. `rows.py` reads the results, and `figure.py`, `findings.py` and `report.py` show them.
"""

from modular_experts.quickstart.figure import draw_figure
from modular_experts.quickstart.plan import Plan
from modular_experts.quickstart.report import summary_sentences, summary_table, write_report
from modular_experts.quickstart.run import TimeLeft, run_plan

__all__ = ["Plan", "TimeLeft", "draw_figure", "run_plan", "summary_sentences", "summary_table", "write_report"]
