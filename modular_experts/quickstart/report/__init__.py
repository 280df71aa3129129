"""The report of a run, from its results alone: a figure, a page, a table and a few sentences. Nothing is measured here.

`reading.py` gives the numbers by name, `findings.py` puts them into sentences; the rest is how they look.
"""

from modular_experts.quickstart.report.figure import check_drawing, draw
from modular_experts.quickstart.report.page import write_report
from modular_experts.quickstart.report.summary import summary_sentences, summary_table

__all__ = ["check_drawing", "draw", "summary_sentences", "summary_table", "write_report"]
