"""What the scripts share: options, calls that take turns, processes of their own, memory, machine, goals and tables."""

import argparse
import gc
import json
import os
import platform
import random
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import torch

__all__ = [
    *("Parser", "goal", "high_water", "in_own_process", "machine", "medians"),
    *("output", "print_goals", "print_machine", "print_table", "race"),
]


class Parser(argparse.ArgumentParser):
    """Parses the options of a script, and says what is wrong in one sentence, without the usage.

    Args:
        text: The docstring of the script.
        quick: What `--quick` does, for the help; the script has neither it nor `--json` if this is left out.
    """

    def __init__(self, text: str | None, quick: str | None = None) -> None:
        super().__init__(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
        if quick:
            self.add_argument("--json", action="store_true", help="print only JSON")
            self.add_argument("--quick", action="store_true", help=quick)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{message}; see --help\n")


def machine() -> dict[str, str]:
    """Return what a reader must know of the machine, and how busy it is: 1 means that each core has one to serve."""
    file = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*:\s*(.*)", file.read_text()) if file.exists() else []
    kind = f"{models[0] if models else platform.processor()} ({torch.backends.cpu.get_cpu_capability()})"
    found = {"CPU": kind, "threads": str(torch.get_num_threads()), "Python": platform.python_version()}
    found |= {name: version(name) for name in ("torch", "transformers", "peft")}
    return found | {"load per core": f"{os.getloadavg()[0] / (os.cpu_count() or 1):.1f}"}


def print_machine(report: Mapping[str, Any]) -> None:
    """Print the machine of a report in one line."""
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))


def output(options: argparse.Namespace, report: dict[str, Any], show: Callable[[dict[str, Any]], None]) -> None:
    """Print a report as `--json` asks, with the machine that made it; where `--json` names a file, write it there."""
    report = {"machine": machine(), "quick": options.quick} | report
    if isinstance(options.json, Path):
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if options.json is True:
        print(json.dumps(report))
    else:
        show(report)


def goal(what: str, measured: float | None, limit: float, at_least: bool = False) -> dict[str, Any]:
    """Return a goal with what was measured, and whether it was met."""
    met = None if measured is None else measured >= limit if at_least else measured <= limit
    sense = "at least" if at_least else "at most"
    return {"goal": what, "measured": measured, "limit": limit, "sense": sense, "met": met}


def print_goals(goals: Iterable[Mapping[str, Any]]) -> None:
    """Print which goals were met."""
    verdicts = {True: "met", False: "missed", None: "not measured"}
    rows = [{**row, "limit": f"{row['sense']} {row['limit']:g}", "met": verdicts[row["met"]]} for row in goals]
    print_table("Goals", rows, {"measured": "measured", "limit": "goal", "met": ""})


def print_table(title: str, rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """Print a title and a table of each row's name, which is its first value, and some of its numbers."""
    print(f"\n{title}\n\n| | {' | '.join(columns.values())} |\n" + "|---" * (1 + len(columns)) + "|")
    for row in rows:
        print("| " + " | ".join([str(next(iter(row.values()))), *(_cell(row.get(key)) for key in columns)]) + " |")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.2g}" if 0 < abs(value) < 0.01 else f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def race(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    warm_up: int = 1,
    after: Callable[[str], Any] = lambda name: None,
) -> dict[str, list[float]]:
    """Return the CPU seconds of each call in each round; they take turns, in an order drawn anew for each round.

    Args:
        calls: By name.
        rounds: How many count.
        warm_up: How many come before these.
        after: What is done after each call, outside of the clock, with its name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    for _ in range(warm_up + rounds):
        shuffle(order)
        gc.collect()
        for name in order:
            start = time.process_time()
            calls[name]()
            seconds[name].append(time.process_time() - start)
            after(name)
    return {name: values[warm_up:] for name, values in seconds.items()}


def medians(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the median of the CPU seconds of each call."""
    return {name: statistics.median(values) for name, values in race(calls, rounds).items()}


def in_own_process(*words: str) -> Any:
    """Run a script with its options in a process of its own, and return the JSON that it prints."""
    return json.loads(subprocess.run([sys.executable, *words], check=True, stdout=subprocess.PIPE, text=True).stdout)


def high_water() -> int:
    """Return the most memory that this process had resident, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux getrusage would include what the process was before it became this one
        return 1024 * int(re.findall(r"VmHWM:\s+(\d+)", status.read_text())[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
