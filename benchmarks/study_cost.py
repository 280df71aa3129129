"""What a study costs beside its bare work, and what its matrix costs beside one `test` for each expert.

A study trains an expert for each of some tasks of the suite, and tests each on every task, in one process of one
thread. Three numbers come of it:

* overhead: the time of the command less what its pieces took, in seconds for each piece (the start of the process, its
  imports, reading the settings and storing results are in it);
* switching: the share of the time of the tests that it takes to put experts into the base and to take them out again;
* matrix: the time of the study's tests, beside the time of `modular-experts test` for as many experts. A few of these
  are measured, and their mean is taken for the others.

    python benchmarks/study_cost.py [BASE] [--experts 20] [--separate 3] [--batch 16] [--quick] [--json]      3 minutes

The base is that of the quickstart unless another is named.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from measuring import Parser, output

from modular_experts.data.suite import HELD_IN, HELD_OUT

MODULAR_EXPERTS = [sys.executable, "-m", "modular_experts"]


def main() -> None:
    parser = Parser(__doc__, quick="two experts, to see that it works")
    parser.add_argument("base", nargs="?", default="runs/quickstart/base", help="directory of a base")
    parser.add_argument("--experts", type=int, default=20, help="how many of the twenty tasks get an expert")
    parser.add_argument("--separate", type=int, default=3, help="how many experts are tested by a command of their own")
    parser.add_argument("--batch", type=int, default=16, help="rows of a batch of the tests, of both ways")
    options = parser.parse_args()
    experts, separate = (2, 1) if options.quick else (options.experts, options.separate)
    with tempfile.TemporaryDirectory() as folder:
        steps, rows = (1, 4) if options.quick else (50, None)
        data = {"eval_limit": rows, "eval_batch_size": options.batch}
        found = measure(Path(options.base).absolute(), experts, separate, Path(folder), steps, data)
    output(options, found | {"experts": experts}, show)


def show(found: dict[str, Any]) -> None:
    """Print what the study took."""
    experts = found["experts"]
    print(f"{found['pieces']} pieces took {found['bare']:.1f} s, the study {found['study']:.1f} s:", end=" ")
    print(f"{found['overhead']:.3f} s of overhead for each piece, {found['overhead'] / 30:.1%} of a piece of 30 s")
    print(f"switching experts took {found['switching']:.2%} of the time of the tests")
    print(
        f"testing {experts} experts on {found['tasks']} tasks took {found['matrix']:.1f} s; by a command for each",
        end=" ",
    )
    print(f"{found['separate']:.1f} s ({found['separate'] / found['matrix']:.1f} times)")


def measure(base: Path, experts: int, separate: int, folder: Path, steps: int, data: dict[str, Any]) -> dict[str, Any]:
    """Run the study and the separate tests in a folder, and return what they took in seconds."""
    held_in, held_out = ([kind.__name__ for kind in kinds] for kinds in (HELD_IN[:experts], HELD_OUT))
    settings: dict[str, Any] = {
        "base": str(base),
        "tasks": {"held_in": held_in, "held_out": held_out},
        "experts": {"lora": {"expert": "LoRAExpert", "modules": "all-linear", "steps": steps}},
        "matrix": True,
        "data": data,
        "max_new_tokens": 10,
        "out": "study",
        "processes": 1,
    }
    Path(folder, "study.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    study = _timed(folder, "study", "--config", "study.yaml")
    lines = [json.loads(line) for line in Path(folder, "study/pieces.jsonl").read_text().splitlines()]
    bare = sum(line["result"]["seconds"] for line in lines)
    tests = [line["result"] for line in lines if line["key"][:2] == ["tests", "lora"]]
    matrix = sum(test["seconds"] for test in tests)
    tasks = [{"name": kind.name(), "source": kind.__name__} for kind in HELD_IN[:experts]]
    tasks += [{"name": kind.name(), "source": kind.__name__, "role": "held_out"} for kind in HELD_OUT]
    config = {"model": {"base": str(base), "max_new_tokens": 10}, "data": data | {"tasks": tasks}}
    Path(folder, "test.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    alone = [
        _timed(folder, "test", "--config", "test.yaml", "--experts", f"study/library/lora-{kind.name()}")
        for kind in HELD_IN[:separate]
    ]
    return {
        "pieces": len(lines),
        "tasks": len(tasks),
        "study": study,
        "bare": bare,
        "overhead": (study - bare) / len(lines),
        "switching": sum(test["switch_seconds"] for test in tests) / matrix,
        "matrix": matrix,
        "separate": fmean(alone) * experts,
    }


def _timed(folder: Path, *words: str) -> float:
    """Run a command on one thread, and return the seconds that it took."""
    started = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([*MODULAR_EXPERTS, *words], cwd=folder, check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
