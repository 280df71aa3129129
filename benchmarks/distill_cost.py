"""What the merge `Distilled` takes by whole models and by one block after another: CPU time and memory.

Each way learns from the inputs that the experts keep (`fit --keep_inputs`), in a process of its own. The table has the
CPU time of all of it over the time by whole models; the most memory of the process beyond the loaded base, in copies of
the base; and the loss of the experts' answers to the same inputs, in nats a token.

    python benchmarks/distill_cost.py library/a library/b ... [--steps 80] [--rows 256] [--max_new_tokens 64]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from merge_work import status

WAYS = ("model", "block")


def measured(way: str, given: argparse.Namespace) -> dict[str, float]:
    """Distil in this process; return seconds, bytes of base and of memory beyond it, and the loss."""
    from modular_experts import Base, Distilled, distill, open_expert

    base = sum(p.nbytes for p in Base.open(None, [open_expert(given.experts[0])]).load().parameters())
    before, started = status("VmRSS") - base, time.process_time()
    method = Distilled(steps=given.steps, rows=given.rows, max_new_tokens=given.max_new_tokens, by=way)
    with tempfile.TemporaryDirectory() as folder:
        done = distill(given.experts, Path(folder, "out"), method)
    peak = status("VmHWM") - before - base
    return {"cpu": time.process_time() - started, "memory": peak / base, "loss": fmean(done.found.losses.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experts", nargs="+")
    for name, default in (("steps", 80), ("rows", 256), ("max_new_tokens", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--way", choices=WAYS, help="measure this one here, and print JSON")
    given = parser.parse_args()
    if given.way:
        print(json.dumps(measured(given.way, given)))
        return
    found: dict[str, dict[str, Any]] = {}
    for way in WAYS:
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[way] = json.loads(done.stdout.splitlines()[-1])
    print("| by | CPU time | memory beyond the base, in copies of it | loss |\n|---|---|---|---|")
    for way, row in found.items():
        print(f"| {way} | {row['cpu'] / found['model']['cpu']:.2f} | {row['memory']:.2f} | {row['loss']:.4f} |")


if __name__ == "__main__":
    main()
