"""Show results as tables, figures and pages made from one schema of rows.

Start with `results.py`: a result is a row of model, experts, task, role, metric and value. `tables.py` shows rows in a
terminal and in HTML by one list of columns, `figure.py` draws them, and `page.py` writes the page that needs no other
file. This room measures nothing.
"""

from modular_experts.reports.results import Results, write_json

__all__ = ["Results", "write_json"]
