"""What it costs to start each command: CPU time of its help, and of commands on a small library, over `import torch`.

Every program runs in a process of its own, interleaved, and the smallest CPU time counts. Goals: at most 1.3 for list,
show, methods and merge; far below 1 for every help.

    python benchmarks/command_start.py [--rounds 5] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile

from modular_experts.__main__ import VERBS

LIBRARY = """
import torch
from modular_experts import Sparse
from modular_experts.library import make_record, write_expert
for name in "ab":
    record = make_record("X", {"id": "base", "revision": None, "fingerprint": "0" * 64})
    write_expert(f"library/{name}", [("w", Sparse(torch.tensor([1, 5]), torch.ones(2), (4, 4)))], record)
"""
COMMANDS = {
    "list": "list library",
    "show": "show library/a",
    "methods": "methods TIES",
    "merge": "merge --experts library/a library/b --method TIES --out library/ab --overwrite",
    "merge --dry-run": "merge --experts library/a library/b --method TIES --out library/ab --dry-run",
    "--help": "--help",
    **{f"{verb} --help": f"{verb} --help" for verb in VERBS},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        _seconds([sys.executable, "-c", LIBRARY], place)
        programs = {"import torch": [sys.executable, "-c", "import torch"]}
        programs |= {
            name: [sys.executable, "-m", "modular_experts", *words.split()] for name, words in COMMANDS.items()
        }
        best = dict.fromkeys(programs, float("inf"))
        for _ in range(options.rounds):
            for name, words in programs.items():
                best[name] = min(best[name], _seconds(words, place))
    ratios = {name: seconds / best["import torch"] for name, seconds in best.items()}
    if options.json:
        print(json.dumps(ratios, indent=2))
        return
    for name, ratio in ratios.items():
        print(f"{name:<20} {ratio:.2f}   ({best[name]:.2f} s)")


def _seconds(words: list[str], place: str) -> float:
    """Return the CPU time of a program, in seconds."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(words, cwd=place, env=environment, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
