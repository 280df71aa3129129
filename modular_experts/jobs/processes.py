"""Run work in processes of this machine, one thread each, which end with the program that started them."""

from __future__ import annotations

import logging
import multiprocessing
import os
import platform
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import Any

MOST_PROCESSES = 8  # each holds torch and transformers, some 500 MB


class LocalProcesses(Executor):
    """An executor that starts processes when work comes, and replaces them if the system kills one.

    As a context manager it waits for its work at the end, and on any error (Ctrl-C too) it ends its processes at once.

    Args:
        processes: How many run at once; by default one a core, at most 8.
    """

    def __init__(self, processes: int | None = None) -> None:
        self.processes = processes or min(cores(), MOST_PROCESSES)
        self._pool: ProcessPoolExecutor | None = None

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """Start a call in a process; see `concurrent.futures.Executor`."""
        if self._pool is None:
            # Spawned, because a fork would copy torch's threads half-way.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.processes, context, initializer=start_process)
        try:
            return self._pool.submit(fn, *args, **kwargs)
        except BrokenProcessPool:
            self._pool = None
            return self.submit(fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more work, and end the processes when theirs is done."""
        if self._pool is not None:
            self._pool.shutdown(wait, cancel_futures=cancel_futures)
            self._pool = None

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        processes = list(self._pool._processes.values()) if self._pool and kind is not None else []
        self.shutdown(wait=kind is None, cancel_futures=kind is not None)
        for process in processes:
            process.kill()


def machine() -> str:
    """Return the processor's name and how many of its cores this process may use."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):  # only Linux has the file
        found = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        name = found[1].strip() if found else name
    return f"{name}, {cores()} core{'s' * (cores() > 1)}"


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_one_thread() -> None:
    """Let torch compute in one thread: several processes run side by side, and sums have the same bits everywhere."""
    os.environ["OMP_NUM_THREADS"] = "1"  # torch reads it when it is imported, which is later
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def start_process() -> None:
    """Set up a process of the pool: one thread, no log lines, and an end when the process that started it ends."""
    use_one_thread()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C
    logging.disable(logging.WARNING)  # a level of Lightning's logger would last until Lightning is imported
    warnings.filterwarnings("ignore")
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)  # SIGTERM would not do: Lightning catches it while it trains, and the process would stay
