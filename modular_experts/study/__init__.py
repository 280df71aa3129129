"""Train many experts, merge them and measure what the merges did, from one description.

`settings.py` reads and checks what a study shall do, with `short_forms.py` and `merges.py`. `pieces.py` cuts it into
pieces of work, whose digests tell what a change of the study does anew; open it first. `work.py` does one piece,
`run.py` runs the pieces that have no result, `results.py` makes rows of their results, `summary.py` a table and
sentences, and `report.py` a page.
"""

from modular_experts.study.pieces import pieces_of
from modular_experts.study.results import results_of
from modular_experts.study.run import run_study
from modular_experts.study.settings import Description, Study, read_study

__all__ = ["Description", "Study", "pieces_of", "read_study", "results_of", "run_study"]
