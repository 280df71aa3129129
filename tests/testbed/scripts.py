"""Run a script of `benchmarks/` in this process, which spares it the imports of a process of its own."""

from __future__ import annotations

import gc
import io
import runpy
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run_script(name: str, *options: object) -> str:
    """Return what a script prints; `SystemExit` goes on to the caller."""
    printed = io.StringIO()
    # The scripts collect garbage before they take times, and the tests' modules would be looked through each time.
    gc.collect()
    gc.freeze()
    try:
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
            patch.syspath_prepend(BENCHMARKS)
            patch.setattr(sys, "argv", [name, *map(str, options)])
            runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
    finally:
        gc.unfreeze()
    return printed.getvalue()
