"""Run many pieces of work: restartable, several at a time, and one failure stops only the pieces that need it.

`Piece` and the results of earlier runs are in `pieces.py`, and the loop is in `run.py`. It takes any
`concurrent.futures.Executor`: `engine` in `engines.py` returns the one of this machine, SLURM, dask or Ray. The loop
decides nothing about what a piece computes.
"""

from modular_experts.jobs.engines import engine
from modular_experts.jobs.pieces import FailedPiecesError, JSONLines, Outcome, Piece
from modular_experts.jobs.processes import LocalProcesses, cores
from modular_experts.jobs.remote import KilledError
from modular_experts.jobs.run import print_progress, run

__all__ = [
    "FailedPiecesError",
    "JSONLines",
    "KilledError",
    "LocalProcesses",
    "Outcome",
    "Piece",
    "cores",
    "engine",
    "print_progress",
    "run",
]
