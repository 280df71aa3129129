"""End the process of a command without taking its objects apart.

Python's own end looks through all objects for garbage and frees them one by one. torch, Lightning and transformers
bring a million, which took 1.5 s, a fifth of the CPU time of a fit of one step. The operating system frees them all at
once.
"""

from __future__ import annotations

import atexit
import gc
import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress


def run_and_end(command: Callable[[], int]) -> int:
    """Return the exit code of a command; as the process ends, `_end` is the last thing that runs.

    Python ends in its own way after an exception, and where a debugger, a profiler or a measurer of coverage traces it.
    """
    codes: list[int] = []
    # Python joins threads, then calls what libraries have registered, and last what was registered first.
    atexit.register(lambda: _end(codes[0]) if codes else None)
    code = command()
    if not (sys.gettrace() or sys.getprofile()):
        codes.append(code)
        # What the imports brought need not be looked through for files.
        atexit.unregister(gc.unfreeze)
    return code


def _end(code: int) -> None:
    """End the process at once, after writing what files that a user's class left open still hold back."""
    # What was frozen after the imports, as `sys.stdout` was, is not among these objects.
    files = [one for one in gc.get_objects() if type(one) in (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)]
    for one in (sys.stdout, *files):
        # There is no stdout, a closed file, or a reader that left.
        with suppress(AttributeError, ValueError, OSError):
            one.flush()
    os._exit(code)
