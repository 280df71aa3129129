"""Run many pieces of work: restartable, several at a time, and one failure stops only the pieces that need it.

`Piece` and the results of earlier runs are in `pieces.py`, the loop is in `run.py`, and the processes of this machine
are in `processes.py`. The loop takes any `concurrent.futures.Executor`, so that clusters plug in; it decides nothing
about what a piece computes.
"""

from modular_experts.jobs.pieces import FailedPiecesError, JSONLines, Outcome, Piece
from modular_experts.jobs.processes import LocalProcesses, cores
from modular_experts.jobs.run import print_progress, run

__all__ = ["FailedPiecesError", "JSONLines", "LocalProcesses", "Outcome", "Piece", "cores", "print_progress", "run"]
