"""Carry a call to another process, perhaps on another machine, and its result or its error back.

The adapters of `slurm_jobs.py`, `dask_workers.py` and `ray_tasks.py` share this, so that a piece finds the same
surroundings and fails in the same words on all of them.
"""

from __future__ import annotations

import importlib
import os
import pickle
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Future
from types import ModuleType
from typing import Any

from modular_experts.jobs.processes import use_one_thread

_ALONE = threading.Lock()


class KilledError(BrokenExecutor):
    """The process of one call ended without a result, such as for its memory; other calls are not concerned."""


class RemoteTraceError(Exception):
    """Holds the trace of an error on another machine, as its cause."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class Call:
    """A function with its arguments, which another process calls as this one would.

    It gets the directory, the import path and one thread, as the processes of `LocalProcesses` do. So a module beside
    the user is found, relative paths hold, and sums have the same bits. The directory must exist there.

    Args:
        function: What to call; one that no module holds travels by value.
        args: Its arguments.
        kwargs: Its named arguments.
    """

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Pickled here, because the path by which a function is imported must be set before it is unpickled.
        self.pickled = importlib.import_module("cloudpickle").dumps((function, args, kwargs))
        self.directory, self.path = os.getcwd(), [place or os.getcwd() for place in sys.path]

    def __call__(self) -> tuple[bool, Any]:
        """Return True and the result, or False and the error with its trace."""
        # One at a time: pieces share what a process has loaded, such as a base with an expert in place.
        with _ALONE:
            try:
                os.chdir(self.directory)
                sys.path += [place for place in self.path if place not in sys.path]
                use_one_thread()
                function, args, kwargs = pickle.loads(self.pickled)
                return True, function(*args, **kwargs)
            except Exception as error:
                return False, (_picklable(error), traceback.format_exc())


def settle(future: Future, outcome: tuple[bool, Any]) -> None:
    """Give a future the result or the error that a `Call` returned."""
    succeeded, found = outcome
    if succeeded:
        future.set_result(found)
    else:
        error, trace = found
        error.__cause__ = RemoteTraceError(trace)
        future.set_exception(error)


def settled_by(inner: Future, explain: Callable[[BaseException], BaseException]) -> Future:
    """Return a future that settles with the `Call` of a library's own one, and cancels that one if it is cancelled.

    `explain` returns the error to report for one of the library.
    """
    outer: Future = Future()

    def finish(inner: Future) -> None:
        if outer.done():
            return
        if inner.cancelled():
            outer.set_exception(BrokenExecutor("the cluster dropped the call; does its scheduler still run?"))
        elif error := inner.exception():
            outer.set_exception(explain(error))
        else:
            settle(outer, inner.result())

    outer.add_done_callback(lambda outer: outer.cancelled() and inner.cancel())
    inner.add_done_callback(finish)
    return outer


def needed(module: str, extra: str) -> ModuleType:
    """Import a module of an extra.

    Raises:
        ValueError: It is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the engine {extra} needs {error.name}, which is not installed: pip install 'modular-experts[{extra}]'"
        ) from None


def _picklable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
