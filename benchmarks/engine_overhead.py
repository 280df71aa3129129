"""What does an engine add to each piece of work?

It runs pieces that do nothing on each engine that is there, and prints the seconds that a piece takes, and how many of
them the program computes that hands out the pieces. SLURM is the cluster at hand, such as the one of
`tests/testbed/slurm.py`:

    python tests/testbed/slurm.py python benchmarks/engine_overhead.py

It takes three minutes.
"""

import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import Executor
from typing import Any

from measuring import Parser

from modular_experts.reports.results import machine
from modular_experts.study.engines import engine
from modular_experts.study.piece import Piece
from modular_experts.study.run_pieces import run_pieces

PROCESSES = 2


def started(name: str, folder: str) -> Executor:
    """Return an engine, which may write into a folder."""
    of_slurm: dict[str, Any] = {"folder": folder, "poll_seconds": 1.0, "jobs": PROCESSES}
    return engine(name, **({"processes": PROCESSES} if name == "local" else of_slurm))


def measured(name: str, count: int) -> dict[str, float]:
    """Return seconds: until the first results, per piece that does nothing, and of this program's CPU per piece."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=".") as folder, started(name, folder) as executor:
        run_pieces([Piece((n,), abs, (n,)) for n in range(PROCESSES)], executor=executor).raise_failures()
        first, used = time.perf_counter(), sum(os.times()[:4])
        run_pieces([Piece((n,), abs, (n,)) for n in range(count)], executor=executor).raise_failures()
        ended, used = time.perf_counter(), sum(os.times()[:4]) - used
    return {"start": first - begun, "piece": (ended - first) / count, "cpu": used / count, "pieces": count}


def is_here(name: str) -> bool:
    """Return whether an engine can run on this machine."""
    return name == "local" or bool(importlib.util.find_spec("submitit") and shutil.which("sbatch"))


def main() -> None:
    """Measure and print."""
    parser = Parser(__doc__, quick="few pieces, to see that it runs")
    parser.add_argument("--engines", nargs="*", default=["local", "slurm"])
    given = parser.parse_args()
    found = {}
    for name in given.engines:
        if not is_here(name):
            print(f"{name} is not installed here, and was left out", file=sys.stderr)
            continue
        count = 20 if name == "slurm" else 500
        found[name] = measured(name, 4 if given.quick else count)
        if not given.json:
            numbers = found[name]
            times = f"{numbers['piece'] * 1000:8.2f} ms a piece, {numbers['cpu'] * 1000:6.2f} ms of CPU here"
            print(f"{name:<6} {numbers['start']:6.2f} s to start, {times}", flush=True)
    print(json.dumps({"machine": machine(), "processes": PROCESSES} | found) if given.json else machine())


if __name__ == "__main__":
    main()
