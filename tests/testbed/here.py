"""Do work here that a program gives to processes: each of them would import torch and Lightning for five seconds."""

import pickle
import tempfile
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest
from testbed.forked import ended, forked


class Here(Executor):
    """Calls a function when it is submitted, with copies of its arguments, such as a process gets."""

    def __init__(self, processes: int | None = None, bytes_each: int = 0) -> None:
        self.processes = 1

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        try:
            call, given, named = pickle.loads(pickle.dumps((fn, args, kwargs)))
            future.set_result(pickle.loads(pickle.dumps(call(*given, **named))))
        except Exception as error:
            future.set_exception(error)
        return future


class Apart(Here):
    """Calls each function in a copy of this process, which ends with it."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "result")
            status = ended(forked(lambda: file.write_bytes(pickle.dumps(fn(*args, **kwargs))) and 0))
            if status:
                future.set_exception(RuntimeError(f"the copy ended with {status}"))
            else:
                future.set_result(pickle.loads(file.read_bytes()))
        return future


def work_here(patch: pytest.MonkeyPatch, *modules: str) -> None:
    """Let modules that import `LocalProcesses` do all work in this process."""
    for module in modules:
        patch.setattr(f"{module}.LocalProcesses", Here)


STUDY = ("modular_experts.study.run",)
