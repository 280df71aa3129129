"""Run the pieces of a plan that have no result yet, several at a time.

Results are stored as they come, so an interrupted run goes on where it was. The loop records a piece that raises, or
whose process the system kills, as failed, and goes on with the others.
"""

from __future__ import annotations

import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from contextlib import ExitStack

from modular_experts.jobs.pieces import Outcome, Piece, Store, key_text
from modular_experts.jobs.processes import LocalProcesses

JobProgress = Callable[[int, int, Piece | None], None]
"""Called with how many pieces are finished, how many there are, and the piece that finished (None at the start)."""


def run(
    pieces: Sequence[Piece],
    store: Store | None = None,
    executor: Executor | None = None,
    progress: JobProgress = lambda done, total, piece: None,
) -> Outcome:
    """Run each piece whose result the store lacks, and store its result.

    Args:
        pieces: What to run, in any order; no two share a key.
        store: Where results go; by default they are only in what is returned.
        executor: Where the pieces run: any `concurrent.futures.Executor`, such as one of dask, Ray or SLURM. By
            default a process for each core of this machine, which ends with this call.
        progress: Called at the start and after each piece.

    Returns:
        The new results and the failures. `.raise_failures()` turns failures into an error.

    Raises:
        ValueError: Two pieces have the same key.
        BrokenExecutor: The caller's own executor broke and takes no more work.
    """
    for key, count in Counter(piece.key for piece in pieces).items():
        if count > 1:
            raise ValueError(f"two pieces have the key {key_text(key)}; give each a key of its own")
    waiting = deque(piece for piece in pieces if store is None or piece.key not in store)
    outcome = Outcome(len(pieces))
    done = len(pieces) - len(waiting)
    progress(done, len(pieces), None)
    running: dict[Future, Piece] = {}
    suspects: deque[Piece] = deque()
    with ExitStack() as stack:
        pool = stack.enter_context(LocalProcesses()) if executor is None else executor
        slots = getattr(pool, "processes", len(pieces))
        # A run that ends early takes back what the caller's executor has not begun.
        stack.callback(lambda: [future.cancel() for future in running])
        while waiting or suspects or running:
            # A process that is killed takes down all that run beside it. No more pieces run at once than there are
            # processes, so few are under suspicion, and each of these runs again alone: whichever then breaks its
            # process is the one that failed.
            while (waiting and not suspects and len(running) < slots) or (suspects and not running):
                piece = (suspects or waiting).popleft()
                running[pool.submit(piece.function, *piece.arguments)] = piece
            alone = len(running) == 1
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                piece, error = running.pop(future), future.exception()
                if isinstance(error, BrokenExecutor) and not alone:
                    suspects.append(piece)
                    continue
                if error is None:
                    outcome.results[piece.key] = future.result()
                    if store is not None:
                        store[piece.key] = outcome.results[piece.key]
                else:
                    outcome.failures[piece.key] = error
                done += 1
                progress(done, len(pieces), piece)
    return outcome


def print_progress() -> JobProgress:
    """Return a progress that prints a line to standard error for each piece, with the time that is left."""
    started, before = time.monotonic(), 0

    def show(done: int, total: int, piece: Piece | None) -> None:
        nonlocal before
        if piece is None:
            before = done
            return
        minutes = (time.monotonic() - started) / (done - before) * (total - done) / 60
        print(f"{done} of {total}, {minutes:.0f} minutes left: {piece}", file=sys.stderr, flush=True)

    return show
