"""Start SLURM on this machine, once for all tests."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
from testbed.slurm import is_installed, slurm


@pytest.fixture(scope="session")
def slurm_started() -> Iterator[None]:
    if not is_installed() or importlib.util.find_spec("submitit") is None:
        pytest.skip("SLURM's daemons, munge or submitit are not installed")
    with slurm():
        yield


@pytest.fixture
def cluster(slurm_started, tmp_path) -> tuple[str, dict[str, Any]]:
    return "slurm", {"folder": tmp_path / "jobs", "poll_seconds": 0.3}
