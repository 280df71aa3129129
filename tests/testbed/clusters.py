"""Start dask, Ray and SLURM on this machine, once for all tests; a test of the fixture `cluster` runs on each."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from testbed.slurm import is_installed, slurm


@pytest.fixture(scope="session")
def dask_address(tmp_path_factory) -> Iterator[str]:
    pytest.importorskip("distributed", reason="dask's distributed is not installed")
    folder = tmp_path_factory.mktemp("dask")
    file = folder / "scheduler.json"
    dask, quiet = [sys.executable, "-m", "dask"], {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    local = ["--scheduler-file", str(file), "--no-dashboard", "--host", "127.0.0.1"]
    rules = os.environ | {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "1"}
    with ExitStack() as stack:
        for command in (["scheduler", "--port", "0"], ["worker", "--nthreads", "1", "--nworkers", "2"]):
            process = subprocess.Popen([*dask, *command, *local], cwd=folder, env=rules, **quiet)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            while not file.exists():
                assert process.poll() is None, "the scheduler did not start"
                time.sleep(0.1)
        yield str(file)


@pytest.fixture(scope="session")
def ray_started() -> Iterator[None]:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    # Ray warns that a coming version behaves otherwise with the first, would write a token into the home directory, and
    # would give its workers a low priority, with which they starve on a busy machine.
    quiet = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}
    os.environ |= quiet
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def slurm_started() -> Iterator[None]:
    if not is_installed() or importlib.util.find_spec("submitit") is None:
        pytest.skip("SLURM's daemons, munge or submitit are not installed")
    with slurm():
        yield


@pytest.fixture(params=["dask", "ray", "slurm"])
def cluster(request, tmp_path) -> tuple[str, dict[str, Any]]:
    if request.param == "dask":
        return "dask", {"address": request.getfixturevalue("dask_address")}
    request.getfixturevalue(f"{request.param}_started")
    return request.param, {"folder": tmp_path / "jobs", "poll_seconds": 0.3} if request.param == "slurm" else {}
