"""Run the pieces that have no result yet, several at a time; an interrupted run goes on where it was."""

from collections import Counter, deque
from collections.abc import Callable, MutableMapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from contextlib import ExitStack
from graphlib import CycleError, TopologicalSorter
from heapq import heappop, heappush

from modular_experts.reports.json_lines import Key, key_text
from modular_experts.study.piece import KilledError, Outcome, Piece
from modular_experts.study.processes import LocalProcesses, at_once

JobProgress = Callable[[int, int, Piece | None], None]
"""Called with how many pieces are finished, how many there are, and the piece that finished (None at the start)."""


def run_pieces(
    pieces: Sequence[Piece],
    store: MutableMapping[Key, object] | None = None,
    executor: Executor | None = None,
    progress: JobProgress = lambda done, total, piece: None,
    failed: Callable[[Piece, BaseException], None] = lambda piece, error: None,
) -> Outcome:
    """Run each piece whose result the store lacks, after those that it needs, and store its result.

    Pieces that need one without a result do not run; all others do.

    Args:
        pieces: What to run, in any order; no two share a key. The first in the list that may run goes first.
        store: Where results go, by key: a `dict`, or `JSONLines` on disk; by default the returned outcome alone.
        executor: Where the pieces run; by default `LocalProcesses`, which end with this call.
        progress: Called at the start and after each piece, also after one that could not run.
        failed: Called with each piece that fails and its error, before `progress`.

    Raises:
        ValueError: Two pieces have the same key, or one needs a piece that is not there, or, perhaps through others,
            itself.
        BrokenExecutor: The caller's own executor broke and takes no more work.
        OSError: The store cannot keep a result, such as on a full disk; the results before it are kept.
    """
    store = {} if store is None else store
    left = _Left(pieces, store)
    outcome = Outcome(len(pieces))
    done = len(pieces) - len(left.needs)
    progress(done, len(pieces), None)
    running: dict[Future, Piece] = {}
    suspects: deque[Piece] = deque()
    with ExitStack() as stack:
        pool = executor or stack.enter_context(LocalProcesses())
        slots = at_once(pool) or len(pieces)
        # A run that ends early takes back what the caller's executor has not begun.
        stack.callback(lambda: [future.cancel() for future in running])
        while left.ready or suspects or running:
            # A process that is killed may take down all that run beside it. No more pieces run at once than there are
            # processes, so few are under suspicion, and each of these runs again alone: whichever then breaks its
            # process is the one that failed. A `KilledError` concerns one piece, and needs no second run.
            while (left.ready and not suspects and len(running) < slots) or (suspects and not running):
                piece = suspects.popleft() if suspects else pieces[heappop(left.ready)]
                results = [store[key] for key in piece.given]
                running[pool.submit(piece.function, *piece.arguments, *results)] = piece
            alone = len(running) == 1
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                piece = running.pop(future)
                error = future.exception()
                if isinstance(error, BrokenExecutor) and not isinstance(error, KilledError) and not alone:
                    suspects.append(piece)
                    continue
                finished = [piece]
                if error is None:
                    outcome.results[piece.key] = store[piece.key] = future.result()
                    left.finish(piece.key)
                else:
                    outcome.failures[piece.key] = error
                    failed(piece, error)
                    dropped = left.drop(piece.key)
                    outcome.skipped |= {other.key: piece.key for other in dropped}
                    finished += dropped
                for other in finished:
                    done += 1
                    progress(done, len(pieces), other)
    return outcome


class _Left:
    """The pieces that are still to run: what each needs, and the places in the list of those that are `ready`."""

    def __init__(self, pieces: Sequence[Piece], store: MutableMapping[Key, object]) -> None:
        for key, count in Counter(piece.key for piece in pieces).items():
            if count > 1:
                raise ValueError(f"two pieces have the key {key_text(key)}; give each a key of its own")
        self.pieces = pieces
        self.place = {piece.key: number for number, piece in enumerate(pieces)}
        for piece in pieces:
            for key in piece.needs:
                if key not in self.place:
                    raise ValueError(f"{piece} needs {key_text(key)}, which is not among the pieces; add it")
        done = {piece.key for piece in pieces if piece.key in store}
        self.needs = {piece.key: {*piece.needs} - done for piece in pieces if piece.key not in done}
        self.sorter = TopologicalSorter(self.needs)
        self.ready: list[int] = []
        self.lost: set[Key] = set()
        try:
            self.order = [*TopologicalSorter(self.needs).static_order()]
        except CycleError as error:
            circle = " needs ".join(key_text(key) for key in reversed(error.args[1]))
            raise ValueError(f"pieces wait for each other: {circle}; take one of these needs out") from None
        self.sorter.prepare()
        self.finish()

    def finish(self, *keys: Key) -> None:
        """Make the pieces ready that waited for these alone."""
        self.sorter.done(*keys)
        for key in self.sorter.get_ready():
            heappush(self.ready, self.place[key])

    def drop(self, failed: Key) -> list[Piece]:
        """Return the pieces that need this one, directly or through others, and no other that failed before."""
        before = {*self.lost}
        self.lost.add(failed)
        for key in self.order:
            if self.needs[key] & self.lost:
                self.lost.add(key)
        return [self.pieces[self.place[key]] for key in self.order if key in self.lost - before - {failed}]
