"""Compile a C++ file of the package when it is first used, and load it.

GCC or Clang compiles one in about a second. The library is kept in a cache for this compiler and this processor.
"""

import ctypes
import hashlib
import itertools
import logging
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

_log = logging.getLogger(__name__)

COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared")
CHOICES = (("-march=native", "-fopenmp"), ("-march=native",), ())
"""More flags, best first: some compilers lack OpenMP, some do not know the native architecture."""
_TYPES = {"int": ctypes.c_int, "int64_t": ctypes.c_int64, "float": ctypes.c_float, "double": ctypes.c_double}


def load_compiled(source: Path, *flags: str) -> ctypes.CDLL | None:
    """Return the library of a C++ file, compiled now if it is not in the cache; where that fails, log why.

    Its functions of C have the types that their signatures in the file give.
    """
    compilers = list(dict.fromkeys(filter(None, map(shutil.which, (os.environ.get("CXX", ""), *COMPILERS)))))
    if not compilers:
        _log.info("%s is not used: there is no C++ compiler here (%s).", source.name, ", ".join(COMPILERS))
        return None
    problem: Exception
    # CXX may name a C compiler, whose libraries lack what C++ needs.
    for compiler, choice in itertools.product(compilers, CHOICES):
        try:
            library = ctypes.CDLL(str(_compiled(compiler, source, (*FLAGS, *flags, *choice))))
            _declare(library, source.read_text(encoding="utf-8"))
            return library
        # RuntimeError: the user has no home directory for the cache.
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            problem = error
    reason = problem.stderr.decode() if isinstance(problem, subprocess.CalledProcessError) else str(problem)
    _log.info("%s is not used, as %s could not compile it: %s", source.name, ", ".join(compilers), reason.strip())
    return None


def _declare(library: ctypes.CDLL, source: str) -> None:
    for returned, name, parameters in re.findall(r'extern "C" (\w+) (\w+)\(([^)]*)\)', source):
        types = [words.split() for words in parameters.split(",") if words]
        function = getattr(library, name)
        function.argtypes = [
            ctypes.c_void_p if any("*" in word for word in words) else _TYPES[words[-2]] for words in types
        ]
        function.restype = _TYPES.get(returned)


def _compiled(compiler: str, source: Path, flags: Sequence[str]) -> Path:
    """Return the file of the library for this compiler and this processor; compile it if it is not there."""
    # The macros that a compiler defines give its version and every feature of the processor, but not every flag.
    defined = _run(compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull)
    included = re.findall(r'^#include "(.+)"', source.read_text(encoding="utf-8"), re.MULTILINE)
    files = [source, *(source.parent / name for name in included)]
    sources = [file.read_bytes() for file in files]
    parts = [*map(str.encode, (compiler, *flags)), defined, *sources]
    key = hashlib.sha256(b" ".join(parts)).hexdigest()[:16]
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    kept = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(cache, "torch_extensions"), "modular_experts")
    library = kept / f"{source.stem}-{key}.so"
    if not library.exists():
        started = time.perf_counter()
        library.parent.mkdir(parents=True, exist_ok=True)
        # Several processes may compile at once: each writes a file of its own, and the last whole one stays.
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            _run(compiler, *flags, str(source), "-o", f"{folder}/{library.name}")
            os.replace(f"{folder}/{library.name}", library)
        seconds = time.perf_counter() - started
        _log.info("Compiled %s in %.1f s; the library is kept in %s.", source.name, seconds, library.parent)
    return library


def _run(*command: str) -> bytes:
    return subprocess.run(command, check=True, capture_output=True).stdout
