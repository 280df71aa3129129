"""Run work on the workers of a dask cluster."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future
from pathlib import Path
from typing import Any

from modular_experts.jobs.remote import Call, needed, settled_by


class DaskWorkers(Executor):
    """An executor whose calls run on the workers of a dask cluster.

    Dask gives the calls of a killed worker to others, and a call fails whose workers were killed four times (dask's
    setting `distributed.scheduler.allowed-failures` plus one).

    Args:
        address: The scheduler's, such as `tcp://10.0.0.1:8786`, or the file of `dask scheduler --scheduler-file`.
        options: What `Client.get_executor` takes, such as `resources={"GPU": 1}`.

    Raises:
        ValueError: `distributed` is not installed, no scheduler answers, or a worker has several threads.
    """

    def __init__(self, address: str, **options: Any) -> None:
        distributed = needed("distributed", "dask")
        where = {"scheduler_file": address} if Path(address).is_file() else {"address": address}
        try:
            self._client = distributed.Client(**where, set_as_default=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"no scheduler of dask answers at {address}; start one with `dask scheduler`") from error
        for name, worker in self._client.scheduler_info(n_workers=-1)["workers"].items():
            if worker["nthreads"] > 1:
                self._client.close()
                raise ValueError(
                    f"the worker {name} has {worker['nthreads']} threads, but pieces share what a process has loaded; "
                    "start it with `dask worker --nthreads 1 --nworkers N`, for N processes"
                )
        self._executor = self._client.get_executor(pure=False, **options)
        self._killed = distributed.KilledWorker

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """Give a call to the scheduler; see `concurrent.futures.Executor`."""
        return settled_by(self._executor.submit(Call(fn, args, kwargs)), self._explain)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more work, and leave the cluster when what came before is done, or cancelled."""
        self._executor.shutdown(wait and not cancel_futures)
        self._client.close()

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        self.shutdown(cancel_futures=kind is not None)

    def _explain(self, error: BaseException) -> BaseException:
        # Dask also blames a call that only waited on a worker which another one killed.
        return BrokenExecutor(str(error)) if isinstance(error, self._killed) else error
