"""Run work as jobs of SLURM, through submitit: calls that come together become one array."""

import importlib
import os
import pickle
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress
from pathlib import Path
from time import sleep
from typing import Any

from modular_experts.study.piece import KilledError
from modular_experts.study.processes import use_one_thread

MOST_IN_ARRAY = 1000  # SLURM's MaxArraySize is 1001, unless a site sets another


class SlurmJobs(Executor):
    """An executor whose calls are jobs of SLURM, one process each.

    A job that SLURM preempts, or whose node fails, begins again if the partition allows that. As a context manager it
    waits for its jobs at the end, and on any error (Ctrl-C too) it cancels them.

    Args:
        folder: Directory on the file system that all nodes share, for calls, results and logs. Only the files of jobs
            that were killed stay there.
        time: Minutes that a job may take.
        array_parallelism: Jobs of an array that run at once.
        poll_seconds: Seconds between two looks at the queue and the folder.
        options: What `sbatch` takes, by name: `partition="gpu"`, `gres="gpu:1"`, `cpus_per_task=4`.

    Raises:
        ValueError: submitit or SLURM is missing, or `sbatch` refuses the options.
    """

    def __init__(
        self,
        folder: str | Path = "slurm-jobs",
        time: int = 60,
        array_parallelism: int = 256,
        poll_seconds: float = 5.0,
        **options: Any,
    ) -> None:
        try:
            submitit = importlib.import_module("submitit")
        except ModuleNotFoundError:
            raise ValueError("the engine slurm needs submitit: pip install 'modular-experts[slurm]'") from None
        if not isinstance(time, int):
            raise ValueError(f"time={time!r} of the engine slurm is not a number of minutes; write one, such as 240")
        given = {"time": time, **options}.items()
        flags = [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in given]
        try:
            # This starts nothing.
            found = subprocess.run(["sbatch", "--test-only", *flags, "--wrap=true"], capture_output=True, text=True)
        except FileNotFoundError:
            raise ValueError("the engine slurm needs sbatch; run this on a login node of a cluster") from None
        if found.returncode:
            raise ValueError(f"SLURM refuses {' '.join(flags)}: {found.stderr.strip().splitlines()[-1]}")
        self.folder, self.poll_seconds = Path(folder).absolute(), poll_seconds
        # A piece that ran out of time would run out of it again.
        self._submitit = submitit.SlurmExecutor(self.folder, max_num_timeout=0)
        self._submitit.update_parameters(
            time=time, job_name="modular-experts", array_parallelism=array_parallelism, additional_parameters=options
        )
        self._waiting: queue.SimpleQueue[tuple[Future, Job]] = queue.SimpleQueue()
        self._jobs: dict[Future, Any] = {}
        self._queued: set[str] = set()
        self._closed = self._cancels = False
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """Queue a call as a job; see `concurrent.futures.Executor`."""
        if self._closed:
            raise RuntimeError("the engine slurm was shut down and takes no more work")
        future: Future = Future()
        self._waiting.put((future, Job(fn, args, kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more work, and end when what came before is done, or cancelled."""
        self._cancels, self._closed = cancel_futures, True
        if wait:
            self._watcher.join()

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        self.shutdown(cancel_futures=kind is not None)

    def _watch(self) -> None:
        try:
            while not self._closed or self._jobs or not self._waiting.empty():
                sleep(self.poll_seconds)
                calls = [self._waiting.get() for _ in range(min(self._waiting.qsize(), MOST_IN_ARRAY))]
                for future in [future for future, _ in calls] + list(self._jobs) if self._cancels else []:
                    future.cancel()
                self._submit([(future, call) for future, call in calls if not future.cancelled()])
                for future in [future for future in self._jobs if future.cancelled()]:
                    job = self._jobs.pop(future)
                    job.cancel(check=False)
                    _remove_files(job)
                if self._jobs:
                    self._settle()
        except Exception as error:
            self._closed = True
            left = list(self._jobs) + [self._waiting.get()[0] for _ in range(self._waiting.qsize())]
            for future in left:
                if future.set_running_or_notify_cancel():
                    future.set_exception(error)

    def _submit(self, calls: "Sequence[tuple[Future, Job]]") -> None:
        try:
            jobs = self._submitit.submit_array([call for _, call in calls]) if calls else []
        except Exception as error:  # such as a limit
            for future, _ in calls:
                if future.set_running_or_notify_cancel():
                    future.set_exception(error)
            return
        self._jobs.update(zip([future for future, _ in calls], jobs, strict=True))
        self._queued |= {job.job_id for job in jobs}

    def _settle(self) -> None:
        # The user's jobs in the queue, each job of an array apart; all of ours if SLURM does not answer.
        command = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
        shown = subprocess.run(command, capture_output=True, text=True)
        ours = {job.job_id for job in self._jobs.values()}
        before, self._queued = self._queued, ours if shown.returncode else set(shown.stdout.split())
        # The folder comes after the queue: a job that has left the queue has written its result before. A change of the
        # folder's mode makes a network file system read it anew.
        with suppress(OSError):
            self.folder.chmod(self.folder.stat().st_mode)
        files = set(os.listdir(self.folder))
        for future, job in list(self._jobs.items()):
            if job.paths.result_pickle.name in files:
                succeeded, found = job.result()
                _remove_files(job)
            elif job.job_id in before | self._queued:
                # A second look decides, for a job that is being requeued, and for a slow file system.
                continue
            else:
                succeeded, found = False, KilledError(f"job {job.job_id} was killed; see {job.paths.stderr}")
            del self._jobs[future]
            if future.set_running_or_notify_cancel():
                (future.set_result if succeeded else future.set_exception)(found)


class Job:
    """A function with its arguments, which the process of a job calls as this one would.

    The process gets this one's directory, import path and one thread, so a module beside the user is found, relative
    paths hold, and sums have the same bits. The directory must exist there.
    """

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Pickled here, because the path by which a function is imported must be set before it is unpickled.
        self.pickled = importlib.import_module("cloudpickle").dumps((function, args, kwargs))
        self.directory, self.path = os.getcwd(), [place or os.getcwd() for place in sys.path]

    def __call__(self) -> tuple[bool, Any]:
        """Return True and the result, or False and the error, whose trace is a note of it."""
        # Lightning would take the tasks of the job for processes of its own.
        os.environ.pop("SLURM_NTASKS", None)
        try:
            os.chdir(self.directory)
            sys.path += [place for place in self.path if place not in sys.path]
            use_one_thread()
            function, args, kwargs = pickle.loads(self.pickled)
            return True, function(*args, **kwargs)
        except Exception as error:
            trace = traceback.format_exc()
            try:
                found: Exception = pickle.loads(pickle.dumps(error))
            except Exception:
                found = RuntimeError(f"{type(error).__name__}: {error}")
            found.add_note(trace)
            return False, found

    def checkpoint(self) -> Any:
        """Return what submitit submits again when SLURM preempts the job."""
        return importlib.import_module("submitit.helpers").DelayedSubmission(self)


def _remove_files(job: Any) -> None:
    for name in ("submitted_pickle", "result_pickle", "stdout", "stderr"):
        getattr(job.paths, name).unlink(missing_ok=True)
