"""Choose where models compute, on the device that the user names or on a GPU, and tell what this machine has."""

import os
import re
import sys
from contextlib import suppress
from pathlib import Path

import torch

VARIABLE = "MODULAR_EXPERTS_DEVICE"
"""The variable of the environment that names it, for this process and those that it starts."""


def use_device(name: str) -> None:
    """Compute on a device from now on: `cpu`, `cuda`, `cuda:1`, or another name of torch's.

    Raises:
        ValueError: There is no such device.
    """
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        there = (
            [f"{accelerator.type}:{number}" for number in range(torch.accelerator.device_count())]
            if accelerator
            else []
        )
        listed = " or ".join(["cpu", *there])
        raise ValueError(f"there is no device {name!r} here; compute on {listed}") from None
    os.environ[VARIABLE] = name


def device() -> torch.device:
    """Return where models compute."""
    return torch.device(os.environ.get(VARIABLE) or ("cuda" if torch.cuda.is_available() else "cpu"))


def trainer_device() -> dict[str, object]:
    """Return the arguments of Lightning's `Trainer` for the device that the user has named; it finds one by itself."""
    if VARIABLE not in os.environ:
        return {}
    named = device()
    return {"accelerator": named.type} | ({} if named.index is None else {"devices": [named.index]})


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory() -> int:
    """Return the bytes that new processes can take before this machine swaps; very many if it does not tell."""
    with suppress(OSError):  # only Linux has the file
        if match := re.search(r"^MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE):
            return 1024 * int(match[1])
    return sys.maxsize
