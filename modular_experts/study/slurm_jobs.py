"""Run work as jobs of SLURM: an executor whose threads each submit a job through submitit, and wait for it."""

import importlib
import os
import pickle
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from modular_experts.study.piece import KilledError
from modular_experts.study.processes import use_one_thread


class SlurmJobs(ThreadPoolExecutor):
    """An executor whose calls are jobs of SLURM, one process each.

    A job that SLURM preempts, or whose node fails, begins again if the partition allows that. As a context manager it
    waits for its jobs at the end, and on any error (Ctrl-C too) it cancels them.

    Args:
        folder: Directory on the file system that all nodes share, for calls, results and logs. Only the files of jobs
            that were killed stay there.
        jobs: The most jobs that wait or run at once.
        poll_seconds: Seconds between two looks at the queue and the folder.
        options: What `sbatch` takes, by name: `time=240` (minutes; 60 by default), `partition="gpu"`, `gres="gpu:1"`.

    Raises:
        ValueError: submitit or SLURM is missing.
    """

    def __init__(
        self,
        folder: str | Path = "slurm-jobs",
        jobs: int = 256,
        poll_seconds: float = 5.0,
        **options: str | int | bool,
    ) -> None:
        try:
            submitit = importlib.import_module("submitit")
        except ModuleNotFoundError:
            raise ValueError("the engine slurm needs submitit: pip install 'modular-experts[slurm]'") from None
        self.folder = Path(folder).absolute()
        self.poll_seconds = poll_seconds
        try:
            # A piece that ran out of time would run out of it again.
            self._submitit = submitit.SlurmExecutor(self.folder, max_num_timeout=0)
        except RuntimeError as error:
            raise ValueError(f"the engine slurm must run on a login node of a cluster: {error}") from None
        minutes = options.pop("time", 60)
        self._submitit.update_parameters(time=minutes, job_name="modular-experts", additional_parameters=options)
        self._lock = threading.Lock()
        self._looked = 0.0
        self._queued: set[str] | None = None
        self._stops = False
        super().__init__(jobs)

    def submit(self, fn: Callable[..., Any], /, *args: object, **kwargs: object) -> Future:
        """Queue a call as a job; see `concurrent.futures.Executor`."""
        return super().submit(self._run, Call(fn, args, kwargs))

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._stops = kind is not None
        self.shutdown(cancel_futures=self._stops)

    def _run(self, call: "Call") -> object:
        """Do a call in a job, and return its result or raise its error."""
        with self._lock:
            job = self._submitit.submit(call)
        missed = 0
        while not job.paths.result_pickle.exists():
            if self._stops:
                job.cancel(check=False)
                _remove_files(job)
                raise CancelledError
            # A second look decides, for a job that is being requeued, and for a slow file system.
            if missed == 2:
                raise KilledError(f"job {job.job_id} was killed; see {job.paths.stderr}")
            time.sleep(self.poll_seconds)
            queued = self._ours()
            missed = 0 if queued is None or job.job_id in queued else missed + 1
        succeeded, outcome = job.result()
        _remove_files(job)
        if not succeeded:
            raise outcome
        return outcome

    def _ours(self) -> set[str] | None:
        """Return which jobs of the user are in the queue, or None where SLURM does not answer; all threads ask once.

        submitit asks sacct, which many clusters lack: without it, it would wait for a killed job for ever.
        """
        with self._lock:
            if time.monotonic() >= self._looked + self.poll_seconds:
                command = ["squeue", "--me", "--noheader", "--format=%i"]
                shown = subprocess.run(command, capture_output=True, text=True)
                self._queued = None if shown.returncode else set(shown.stdout.split())
                self._looked = time.monotonic()
                # A change of the folder's mode makes a network file system read it anew.
                with suppress(OSError):
                    self.folder.chmod(self.folder.stat().st_mode)
            return self._queued


class Call:
    """A function with its arguments, which the process of a job calls as this one would.

    The process gets this one's directory, import path and one thread, so a module beside the user is found, relative
    paths hold, and sums have the same bits. The directory must exist there.
    """

    def __init__(self, function: Callable[..., object], args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        # Pickled here, because the path by which a function is imported must be set before it is unpickled.
        self.pickled = importlib.import_module("cloudpickle").dumps((function, args, kwargs))
        self.directory = os.getcwd()
        self.path = [place or self.directory for place in sys.path]

    def __call__(self) -> tuple[bool, object]:
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
            try:
                carried: Exception = pickle.loads(pickle.dumps(error))
            except Exception:
                carried = RuntimeError(f"{type(error).__name__}: {error}")
            carried.add_note(traceback.format_exc())
            return False, carried

    def checkpoint(self) -> object:
        """Return what submitit submits again when SLURM preempts the job."""
        return importlib.import_module("submitit.helpers").DelayedSubmission(self)


def _remove_files(job: Any) -> None:
    for name in ("submitted_pickle", "result_pickle", "stdout", "stderr"):
        getattr(job.paths, name).unlink(missing_ok=True)
