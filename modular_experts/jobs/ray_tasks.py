"""Run work as tasks of Ray."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from concurrent.futures import wait as wait_for
from typing import Any

from modular_experts.jobs.remote import Call, KilledError, needed, settled_by


class RayTasks(Executor):
    """An executor whose calls are tasks of Ray.

    Args:
        address: A cluster's, such as `ray://10.0.0.1:10001`, or `auto` for the one of this machine. By default
            `RAY_ADDRESS`, or Ray is started on this machine.
        max_retries: How often a call runs again whose process was killed or whose node failed.
        options: What `ray.remote` takes, such as `num_gpus=1`.

    Raises:
        ValueError: Ray is not installed, or no cluster answers.
    """

    def __init__(self, address: str | None = None, max_retries: int = 0, **options: Any) -> None:
        self._ray = needed("ray", "ray")
        self._started = not self._ray.is_initialized()
        if self._started:
            try:
                self._ray.init(address, log_to_driver=False)
            except ConnectionError as error:
                raise ValueError(f"no cluster of Ray answers at {address}; start one with `ray start`") from error
        self._task = self._ray.remote(_call).options(max_retries=max_retries, **options)
        self._futures: set[Future] = set()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """Start a call as a task; see `concurrent.futures.Executor`."""
        task = self._task.remote(Call(fn, args, kwargs))
        future = settled_by(task.future(), self._explain)
        future.add_done_callback(lambda future: future.cancelled() and self._ray.cancel(task, force=True))
        self._futures.add(future)
        future.add_done_callback(self._futures.discard)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more work, and leave the cluster when what came before is done, or cancelled."""
        for future in list(self._futures) if cancel_futures else []:
            future.cancel()
        if wait:
            wait_for(list(self._futures))
        if self._started:
            self._ray.shutdown()

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        self.shutdown(cancel_futures=kind is not None)

    def _explain(self, error: BaseException) -> BaseException:
        found = self._ray.exceptions
        lost = (found.WorkerCrashedError, found.OutOfMemoryError, found.NodeDiedError, found.LocalRayletDiedError)
        return KilledError(" ".join(str(error).split())) if isinstance(error, lost) else error


def _call(call: Call) -> tuple[bool, Any]:
    return call()
