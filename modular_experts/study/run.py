"""Run the pieces of a study that have no result yet, in its directory.

The directory holds the library, `pieces.jsonl` with a line for every piece that was done or failed, and `results.json`
and `report.html`, which are made of these lines. It may be interrupted at any moment.
"""

import math
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch

from modular_experts.base import Base
from modular_experts.base.device import cores, free_memory
from modular_experts.base.files import read_layouts
from modular_experts.library import is_name, open_expert
from modular_experts.library.atomic import locked, remove_leftovers
from modular_experts.library.record import RECORD_FILE, read_record
from modular_experts.reports.json_lines import JSONLines, Key
from modular_experts.reports.results import Facts
from modular_experts.study.piece import Piece
from modular_experts.study.pieces import pieces_of
from modular_experts.study.plan import Study
from modular_experts.study.processes import LocalProcesses, at_once
from modular_experts.study.run_pieces import run_pieces
from modular_experts.study.work import check_templates, training_bytes, warn_of_copies

PIECES = "pieces.jsonl"


@dataclass(frozen=True)
class Failure:
    """Why a piece has no result: its own error, or the failed piece that it needs."""

    sentence: str
    needed: Key | None = None


class Lines(JSONLines):
    """The results of a study's pieces, which count only while their expert is in the library as it was.

    A result no longer counts when an expert that it was made of has other contents; a missing one may come back.
    A failure is a line too: `{"failed": sentence, "trace": ...}`.
    """

    def __init__(self, out: Path) -> None:
        super().__init__(out / PIECES)
        self.library = out / "library"

    def __contains__(self, key: object) -> bool:
        result: Facts | None = self.get(key)  # type: ignore[call-overload]
        if result is None or "failed" in result:
            return False
        expert = result.get("expert")
        made_of: Mapping[str, str] = result.get("made_of", {})
        if any(self._hash_of(name) not in (None, content_hash) for name, content_hash in made_of.items()):
            return False
        return self._is_there(expert) and all((self.library / file).exists() for file in result.get("files", ()))

    def failure(self, key: Key) -> str | None:
        """Return why a piece failed, if it has no result since."""
        return (self.get(key) or {}).get("failed")

    def _is_there(self, expert: Facts | None) -> bool:
        """Return whether the library has the expert of a result, and not one of other settings under its name."""
        if expert is None:
            return True
        try:
            return open_expert(self.library / expert["name"]).content_hash == str(expert["content_hash"])
        except (OSError, ValueError):
            return False

    def _hash_of(self, name: str) -> str | None:
        try:
            return str(read_record(self.library / name / RECORD_FILE)["content_hash"])
        except (OSError, ValueError):
            return None


@dataclass
class State:
    """The pieces of a study in order, the results of those that are done, and why others have none, by key."""

    pieces: list[Piece]
    done: dict[Key, Facts]
    failed: dict[Key, Failure]

    @property
    def left(self) -> list[Piece]:
        """The pieces that are still to do."""
        return [piece for piece in self.pieces if piece.key not in self.done and piece.key not in self.failed]

    def seconds_left(self) -> tuple[float, int]:
        """Estimate the time of the remaining pieces on one process, and tell how many pieces this leaves out.

        A piece takes the mean of the finished pieces of its stage and kind, or else of its stage.
        """
        known: dict[Key, list[float]] = {}
        for key, result in self.done.items():
            for sort in (key[:2], key[:1]):
                known.setdefault(sort, []).append(result["seconds"])
        seconds = 0.0
        unknown = 0
        for sort, count in Counter(piece.key[:2] for piece in self.left).items():
            alike = known.get(sort) or known.get(sort[:1])
            if alike:
                seconds += count * fmean(alike)
            else:
                unknown += count
        return seconds, unknown


def state_of(pieces: Sequence[Piece], lines: Lines, retry: bool = False) -> State:
    """Return what the lines of a study's directory tell of its pieces; another process may be at work there.

    With `retry`, what failed is left to do.
    """
    state = State(list(pieces), {piece.key: lines[piece.key] for piece in pieces if piece.key in lines}, {})
    if retry:
        return state
    for piece in pieces:
        needed = next((key for key in piece.needs if key in state.failed), None)
        # What is done anew may be what the piece lacked.
        is_left = needed is None and any(key not in state.done for key in piece.needs)
        sentence = lines.failure(piece.key)
        if sentence is not None and not is_left:
            state.failed[piece.key] = Failure(sentence)
        elif needed is not None and piece.key not in state.done:
            failure = state.failed[needed]
            state.failed[piece.key] = Failure(failure.sentence, failure.needed or needed)
    return state


def run_study(
    study: Study,
    out: str | Path,
    only: Collection[str] = (),
    retry: bool = False,
    executor: Executor | None = None,
    processes: int | None = None,
    progress: Callable[[State, int | None], None] = lambda state, processes: None,
) -> State:
    """Do the remaining pieces of a study, and return what is then done and which pieces failed.

    A piece that fails stops only those that need it. One that failed in an earlier call is tried again where a piece
    that it needs is done anew.

    Args:
        study: What to do.
        out: The directory of the study; the same call goes on with an interrupted one.
        only: The stages to do, with all that they need; by default every stage.
        retry: Whether all pieces that failed in an earlier call are tried again.
        executor: Where the pieces run; by default `processes` of this machine, one thread each.
        processes: How many, without an executor; by default as many as `LocalProcesses` starts, each with twice the
            base, or, where memory may be short, with the largest training that shapes predict.
        progress: Called at the start and after each piece, with the state then, and how many pieces run at once
            (None for an executor that does not tell).

    Raises:
        BlockingIOError: Another process runs a study in `out`; nothing was done.
        FileExistsError: `out` holds other things than a study.
        OSError: A result could not be stored, such as on a full disk; the results before it are kept.
        ValueError: A task needs a chat template that the base lacks; nothing was done.
    """
    out = Path(out).expanduser().absolute()
    pieces = pieces_of(study, out, only)
    claim(out)
    with ExitStack() as stack:
        stack.enter_context(locked(out, out))
        remove_leftovers(out)
        lines = Lines(out)
        lines.file.touch()
        state = state_of(pieces, lines, retry)
        if state.left:
            check_templates(study)
        pool = executor or stack.enter_context(LocalProcesses(processes, 0 if processes else _bytes_each(study, out)))
        # A done piece needs nothing, not even one that failed since.
        todo = [replace(piece, needs=()) if piece.key in state.done else piece for piece in pieces]
        todo = [piece for piece in todo if piece.key not in state.failed]
        before = {*state.done}
        if state.left:
            warn_of_copies(study.at(study.seeds[0]))

        def show(done: int, total: int, piece: Piece | None) -> None:
            if piece is not None and piece.key in lines:
                state.done[piece.key] = lines[piece.key]
            elif piece is not None:
                sentence = lines.failure(piece.key)
                state.failed[piece.key] = Failure(sentence) if sentence else Failure("", piece.needs[0])
            progress(state, at_once(pool))

        def failed(piece: Piece, error: BaseException) -> None:
            trace = "".join(traceback.format_exception(error))
            lines[piece.key] = {"failed": failure_text(error), "trace": trace}

        run_pieces(todo, lines, pool, show, failed)
    after = state_of(pieces, lines)
    if before - after.done.keys():
        # An expert was trained anew and came out otherwise, so what was made of it is left to do.
        return run_study(study, out, only, False, executor, processes, progress)
    return after


def claim(out: Path) -> None:
    """Make the directory of a study, unless it is there; FileExistsError if it holds other things."""
    others = [file for file in out.glob("*") if is_name(file.name) and file.suffix != ".yaml"]
    if others and not (out / PIECES).exists():
        raise FileExistsError(f"{out} holds other things than a study; give another `out=` to keep them")
    out.mkdir(parents=True, exist_ok=True)


def _bytes_each(study: Study, out: Path) -> int:
    """Return what a process takes in memory: the base that it tests and the one that it trains, or a whole training."""
    of_seed = study.at(study.seeds[0])
    layouts = read_layouts(Base.open(of_seed.base).directory).values()
    entries = sum(math.prod(shape) for layout in layouts for _, shape in layout.values())
    pair: int = 2 * getattr(torch, study.dtype).itemsize * entries
    # Weights, their gradients, two moments and activations take less than this.
    if cores() * 4 * pair < free_memory():
        return pair
    kinds = [*of_seed.experts.values(), *of_seed.joint.values()]
    return max(pair, *(training_bytes(of_seed, out, configs) for configs in kinds))


def failure_text(error: BaseException) -> str:
    """Return an error as the table shows it: in one line, with its type where that tells more than its words."""
    if isinstance(error, BrokenProcessPool):
        return "its process was killed, perhaps for lack of memory; smaller batches or fewer `processes=` take less"
    text = " ".join(str(error).split())
    if text and isinstance(error, ValueError | OSError | BrokenExecutor):
        return text
    return f"{type(error).__name__}: {text}".rstrip(": ")
