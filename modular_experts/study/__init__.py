"""Train many experts, merge them and measure what the merges did, from one description.

`settings.py` reads the description into the `Study` of `plan.py`, and `pieces.py` cuts that into pieces of work, whose
digests tell what a change of the study does anew; open it first. `work.py` and `merges.py` do one piece, `run.py` runs
the pieces that have no result, `results.py` makes rows of their results, and `summary.py` and `report.py` show them.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modular_experts.study.pieces import pieces_of
    from modular_experts.study.plan import Study
    from modular_experts.study.results import results_of
    from modular_experts.study.run import run_study
    from modular_experts.study.settings import Description, read_study

# Where a name lives; a command that only reads its settings here imports nothing else.
_HOMES = {
    **{"pieces_of": "pieces", "Study": "plan", "results_of": "results", "run_study": "run"},
    **{"Description": "settings", "read_study": "settings"},
}
__all__ = ["Description", "Study", "pieces_of", "read_study", "results_of", "run_study"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
