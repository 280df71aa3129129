"""Compiled code: a C++ file of ours as a library that is loaded, made when it is first used.

The files need no headers but the language's own, so a compiler (GCC or Clang) makes one in about a second; it is then
kept for this compiler and this processor. Where it cannot be made, one line of the log says why, and the caller does
the same by torch alone.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

__all__ = ["load"]

_log = logging.getLogger(__name__)

COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared")
CHOICES = (("-march=native", "-fopenmp"), ("-march=native",), ())
"""More flags, best first: some compilers know no OpenMP, some no native architecture."""


def load(source: Path, *flags: str) -> ctypes.CDLL | None:
    """Return the library of a source, which may be compiled now, or None if there cannot be one here.

    Args:
        source: The C++ file.
        flags: What the compiler is told beside `FLAGS`.
    """
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), *COMPILERS))), None)
    if compiler is None:
        _log.info("%s is not used: there is no C++ compiler here (%s).", source.name, ", ".join(COMPILERS))
        return None
    problem: Exception
    for choice in CHOICES:
        try:
            return ctypes.CDLL(str(_compiled(compiler, source, (*FLAGS, *flags, *choice))))
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:  # Runtime: no home for a cache
            problem = error
    reason = problem.stderr.decode() if isinstance(problem, subprocess.CalledProcessError) else str(problem)
    _log.info("%s is not used: it cannot be made by %s and loaded: %s", source.name, compiler, reason.strip())
    return None


def _compiled(compiler: str, source: Path, flags: Sequence[str]) -> Path:
    """Return the library for this compiler and this processor, made now if it is not there."""
    # What a compiler defines names its version and all that it may use of the processor, but not every flag.
    defined = _run(compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull)
    key = hashlib.sha256(b" ".join([*map(str.encode, flags), defined, source.read_bytes()])).hexdigest()[:16]
    library = _folder() / f"{source.stem}-{key}.so"
    if not library.exists():
        started = time.perf_counter()
        library.parent.mkdir(parents=True, exist_ok=True)
        # Processes may compile at once: each its own file, and the last whole one stays.
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            _run(compiler, *flags, str(source), "-o", f"{folder}/{library.name}")
            os.replace(f"{folder}/{library.name}", library)
        seconds = time.perf_counter() - started
        _log.info("Compiled %s in %.1f s, once; it is kept in %s.", source.name, seconds, library.parent)
    return library


def _folder() -> Path:
    """Return where torch keeps compiled extensions, and in it the place of this package."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(cache, "torch_extensions")) / "modular_experts"


def _run(*command: str) -> bytes:
    return subprocess.run(command, check=True, capture_output=True).stdout
