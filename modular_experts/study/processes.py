"""Run work in processes of this machine, one thread each, which end with the program that started them."""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.queues import SimpleQueue
from typing import Any

from modular_experts.base.device import cores, free_memory

MOST_PROCESSES = 8
PROCESS_BYTES = 500_000_000  # of a process that holds torch and transformers


def at_once(executor: Executor) -> int | None:
    """Return how many calls an executor runs at once; None if it takes all, and begins them later."""
    return getattr(executor, "processes", None)


class LocalProcesses(Executor):
    """An executor that starts processes when work comes, and replaces them if the system kills one.

    As a context manager it waits for its work at the end, and on any error (Ctrl-C too) it ends its processes at once.

    Args:
        processes: How many run at once. By default one per CUDA device, else one per core (at most 8); never more than
            fit into free memory.
        bytes_each: What a process takes in memory beside 500 MB of imported packages.
        devices: The CUDA devices, as `CUDA_VISIBLE_DEVICES` names them, of which each process sees one in turn; by
            default those that this process sees.
    """

    def __init__(
        self, processes: int | None = None, bytes_each: int = 0, devices: Sequence[str | int] | None = None
    ) -> None:
        self.devices = cuda_devices() if devices is None else list(map(str, devices))
        most = len(self.devices) or min(cores(), MOST_PROCESSES)
        self.processes = processes or max(1, min(most, free_memory() // (PROCESS_BYTES + bytes_each)))
        self._pool: ProcessPoolExecutor | None = None

    def submit(self, fn: Callable[..., Any], /, *args: object, **kwargs: object) -> Future:
        """Start a call in a process; see `concurrent.futures.Executor`."""
        if self._pool is None:
            # Spawned, because a fork would copy torch's threads half-way.
            context = multiprocessing.get_context("spawn")
            devices = None
            if self.devices:
                devices = context.SimpleQueue()
                for number in range(self.processes):
                    devices.put(self.devices[number % len(self.devices)])
            self._pool = ProcessPoolExecutor(self.processes, context, start_process, (devices,))
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

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        processes = list(self._pool._processes.values()) if self._pool and kind is not None else []
        self.shutdown(wait=kind is None, cancel_futures=kind is not None)
        for process in processes:
            process.kill()


def cuda_devices() -> list[str]:
    """Return the CUDA devices that this process sees, as `CUDA_VISIBLE_DEVICES` names them."""
    # torch takes seconds to import, and a program that hands out work for devices has it.
    count = sys.modules["torch"].cuda.device_count() if "torch" in sys.modules else 0
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [str(number) for number in range(count)]
    return named.split(",")[:count]


def use_one_thread() -> None:
    """Let torch compute in one thread: several processes run side by side, and sums have the same bits everywhere."""
    os.environ["OMP_NUM_THREADS"] = "1"  # torch reads it when it is imported, which is later
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def start_process(devices: SimpleQueue[str] | None = None) -> None:
    """Set up a process of the pool, which sees one device of the queue and ends with the process that started it."""
    use_one_thread()
    if devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices.get()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C
    logging.disable(logging.WARNING)  # a level of Lightning's logger would last until Lightning is imported
    warnings.filterwarnings("ignore")

    def end_with_parent() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)  # SIGTERM would not do: Lightning catches it while it trains, and the process would stay

    threading.Thread(target=end_with_parent, daemon=True).start()
