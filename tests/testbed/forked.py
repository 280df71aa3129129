"""Run calls in copies of this process, which has imported what they need, as torch and Lightning take seconds."""

import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

__all__ = ["ended", "forked", "run_on_two_ranks", "start_ranks"]


def forked(call: Callable[..., Any], *arguments: Any, **environment: str) -> int:
    """Start a call in a copy of this process, which leads a group of its own, and return its number.

    Its status is the number that the call returns, or 1 after an error, which it prints.
    """
    sys.stdout.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn of this process's threads, which the copy lacks
        child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.setsid()
        os.environ.update(environment)
        status = call(*arguments) or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def ended(child: int, seconds: float = 180) -> int:
    """Wait for a copy, and return its status; one that a signal ended has that signal's number, negative."""
    begun = time.monotonic()
    while not (found := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > begun + seconds:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(found[1])


def start_ranks(call: Callable[..., Any], *arguments: Any, ranks: int = 2) -> list[int]:
    """Start a call in processes that train together, over gloo on this machine, and return their numbers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "NODE_RANK": "0"}
    return [forked(call, *arguments, **own, LOCAL_RANK=str(rank)) for rank in range(ranks)]


def run_on_two_ranks(call: Callable[..., Any], *arguments: Any) -> None:
    """Run a call in two processes that train together, and check that both succeed."""
    assert [ended(rank) for rank in start_ranks(call, *arguments)] == [0, 0]
