"""The quickstart: a base, experts of four kinds and their merges on the generated suite, and a report of the losses.

It is a user of the package like any other. `plan.py` lists what is done, `base.py` and `work.py` do it, and `run.py`
does all of it once. `rows.py` reads the results, and `figure.py`, `findings.py` and `report.py` show them.
"""

from modular_experts.quickstart.figure import draw_figure
from modular_experts.quickstart.plan import Plan
from modular_experts.quickstart.report import summary_sentences, summary_table, write_report
from modular_experts.quickstart.run import run_plan
from modular_experts.reports.svg import check_drawing

__all__ = ["Plan", "check_drawing", "draw_figure", "run_plan", "summary_sentences", "summary_table", "write_report"]
