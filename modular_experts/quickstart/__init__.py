"""Train a base and experts of four kinds on the generated suite, merge the experts, and report what that loses.

The quickstart is a study of a small base of its own. `plan.py` describes the study, `base.py` makes the base, and
`run.py` does both. `results.py` gathers what was found, `rows.py` reads it, and `figure.py`, `findings.py` and
`report.py` show it.
"""

from modular_experts.quickstart.figure import draw_figure
from modular_experts.quickstart.plan import Plan
from modular_experts.quickstart.report import summary_sentences, summary_table, write_report
from modular_experts.quickstart.run import TimeLeft, run_plan

__all__ = ["Plan", "TimeLeft", "draw_figure", "run_plan", "summary_sentences", "summary_table", "write_report"]
