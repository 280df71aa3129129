"""Show results: one schema of rows, and tables, charts and pages made from it.

Start with `results.py`: a result is a row of model, experts, task, role, metric and value. `tables.py` shows rows in a
terminal and in HTML by one list of columns, `charts.py` draws on the canvas of `svg.py`, and `html.py` builds pages
that need no other file. Nothing is measured here; what one study's report contains is written in that study's room.
"""

from modular_experts.reports.results import Results, results_table, write_json

__all__ = ["Results", "results_table", "write_json"]
