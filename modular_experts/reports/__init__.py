"""Show results as tables, charts and pages made from one schema of rows.

Start with `results.py`: a result is a row of model, experts, task, role, metric and value. `tables.py` shows rows in a
terminal and in HTML by one list of columns, `charts.py` draws on the canvas of `svg.py`, and `html.py` builds pages
that need no other file. This room measures nothing, and each study writes its own report in its own room.
"""

from modular_experts.reports.results import Results, write_json

__all__ = ["Results", "write_json"]
