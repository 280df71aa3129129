"""Run many pieces of work: restartable, several at a time, and one failure stops only the pieces that need it.

Open `pieces.py`, then the loop in `run.py`, which takes any `concurrent.futures.Executor`, such as one of `engine`.
"""

from modular_experts.jobs.engines import engine
from modular_experts.jobs.pieces import KilledError, Outcome, Piece
from modular_experts.jobs.processes import LocalProcesses
from modular_experts.jobs.run import run

__all__ = ["KilledError", "LocalProcesses", "Outcome", "Piece", "engine", "run"]
