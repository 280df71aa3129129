"""What a merge of sparse experts costs beside mergekit's merge of the same experts as full checkpoints.

Both write a full checkpoint in bfloat16. Every merge is a process of its own on one thread; they take turns, mergekit
and ours, and the numbers are ratios of medians: CPU seconds (user and system) of the merge after the imports, and peak
memory with them. The script also tells whether both results are the same. `merge_work` has what a process does,
`merge_inputs` what is merged.

    python benchmarks/merge_speed.py                     2, 8 and 20 experts, three times: an hour
    python benchmarks/merge_speed.py --quick             2 and 8 experts, once: ten minutes
    python benchmarks/merge_speed.py --alone --tiny --quick    without mergekit, tiny: does it run? a minute
    python benchmarks/merge_speed.py --mergekit PYTHON   the Python of another environment that has mergekit

The base has the shape of SmolLM2-135M and random weights; an expert keeps 5 % of each of its 210 linear weights. The
inputs take 6 GB in `runs/merge-speed` and stay there. mergekit needs up to 12 GB of memory; install it beside this
package: pip install mergekit==0.1.5.

The methods are those of the presets, so both compute the same but for this: DARE draws other random numbers, and where
equal magnitudes meet a threshold, ours keeps the first, mergekit any.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measuring import Parser, goal, output, print_goals, print_machine, print_table
from merge_inputs import WEIGHTS, Inputs, Shape
from merge_work import watch

from modular_experts.library import DELTA_FILE

ROOT = Path(__file__).parent.parent
MERGEKIT = "mergekit==0.1.5"
SMOLLM2, TINY = Shape(576, 30, 1536), Shape(64, 2, 128, 512)
MEASURED = ["cpu", "peak", "anonymous", "anonymous_beyond"]
CPU_GOALS = {"linear": 6.0, "task_arithmetic": 10.0, "ties": 15.0, "dare_ties": 12.0, "breadcrumbs": 10.0}
PEAK_GOAL, GROWTH_GOAL, FLOOR_GOAL = 6.0, 1.1, 2.0
COLUMNS = {"cpu": "CPU", "peak": "peak", "anonymous": "anonymous"}
AGREEMENT = {"unequal": "unequal", "unequal_of_moved": "of moved"}


@dataclass(frozen=True)
class Method:
    """A method as mergekit calls it, and as we do.

    Attributes:
        name: Of `merge_method` in mergekit's recipe.
        each: Parameters of each model there.
        ours: Class in `modular_experts.methods`.
        settings: Its settings.
        at_random: Whether the results cannot be the same.
    """

    name: str
    each: dict[str, float]
    ours: str
    settings: dict[str, Any] = field(default_factory=dict)
    at_random: bool = False

    def recipe(self, base: Path, checkpoints: list[Path]) -> dict[str, Any]:
        """Return mergekit's recipe."""
        models = [{"model": str(place), "parameters": self.each} for place in checkpoints]
        found = {"merge_method": self.name, "models": models, "dtype": "float32", "out_dtype": "bfloat16"}
        return found if self.name == "linear" else found | {"base_model": str(base)}


LIKE_MERGEKIT = {"preset": "mergekit"}
METHODS = [
    Method("linear", {"weight": 1.0}, "Average"),
    Method("task_arithmetic", {"weight": 0.3}, "TaskArithmetic", {"scale": 0.3}),
    Method("ties", {"weight": 1.0, "density": 0.02}, "TIES", {"keep": 0.02} | LIKE_MERGEKIT),
    Method("dare_ties", {"weight": 1.0, "density": 0.5}, "DARETIES", {"keep": 0.5} | LIKE_MERGEKIT, at_random=True),
    Method(
        *("breadcrumbs", {"weight": 1.0, "density": 0.02, "gamma": 0.01}),
        *("Breadcrumbs", {"beta": 0.97, "gamma": 0.01} | LIKE_MERGEKIT),
    ),
]


class Bench:
    """Runs the merges of one set of inputs, one process at a time.

    Args:
        inputs: What is merged.
        mergekit: The Python of mergekit; none if only ours is measured.
        repeats: How often each merge is run.
    """

    def __init__(self, inputs: Inputs, mergekit: Path | None, repeats: int) -> None:
        self.inputs, self.mergekit, self.repeats = inputs, mergekit, repeats

    def merges(self, method: Method, experts: int) -> dict[str, Any]:
        """Return the row of a method and a number of experts: mergekit's numbers over ours, and if results agree."""
        peer, ours = [], []
        agreed: dict[str, float] = {}
        for round_ in range(self.repeats):
            self._say(f"{method.name}, {experts} experts, {round_ + 1} of {self.repeats}")
            with self.results() as out:
                if self.mergekit:
                    peer.append(self._by_mergekit(method, experts, out / "mergekit"))
                ours.append(self.by_experts(method, experts, out / "ours"))
                if self.mergekit and not agreed and not method.at_random:
                    agreed = self._agreement(out / "mergekit", out / "ours")
        ratios = over(peer, ours) if peer else {}
        self._say(", ".join(f"{name} {value:.3g}" for name, value in (ratios | agreed).items()))
        return {"method": method.name, "experts": experts, "ours": medians(ours)} | ratios | agreed

    def beside_the_floor(self, method: Method, experts: int) -> dict[str, Any]:
        """Return ours, and ours with the check, over a process that only reads, hashes and writes."""
        runs: dict[str, list[dict[str, Any]]] = {"plain": [], "checked": [], "read": [], "hashed": []}
        for round_ in range(self.repeats):
            self._say(f"floor of {method.name}, {experts} experts, {round_ + 1} of {self.repeats}")
            for name in list(runs)[:: -1 if round_ % 2 else 1]:  # what ran before leaves the system's memory as it is
                found = runs[name]
                self._warm(experts)
                with self.results() as out:
                    if name in ("plain", "checked"):
                        found.append(self.by_experts(method, experts, out / "ours", check=name == "checked"))
                    else:
                        found.append(self._copying(experts, out / "file", hashes=name == "hashed"))
        return {
            "method": method.name,
            "experts": experts,
            "over_hashed": over(runs["plain"], runs["hashed"]),
            "over_read": over(runs["plain"], runs["read"]),
            "checked_over_plain": over(runs["checked"], runs["plain"]),
        }

    def _warm(self, experts: int) -> None:
        """Read the inputs, so that what is measured next finds them in the system's cache."""
        files = [self.inputs.base / WEIGHTS]
        files += [self.inputs.expert(number) / DELTA_FILE for number in range(experts)]
        place = bytearray(1 << 22)
        for file in files:
            with file.open("rb", buffering=0) as source:
                while source.readinto(place):
                    pass

    def _checkpoints(self, count: int) -> list[Path]:
        return [self.inputs.checkpoint(number) for number in range(count)]

    def _by_mergekit(self, method: Method, experts: int, out: Path) -> dict[str, Any]:
        recipe = method.recipe(self.inputs.base, self._checkpoints(experts))
        return watch(str(self.mergekit), "mergekit", recipe=recipe, out=str(out))

    def by_experts(self, method: Method, experts: int, out: Path, check: bool = False) -> dict[str, Any]:
        """Run our merge of stored experts once."""
        places = [str(self.inputs.expert(number)) for number in range(experts)]
        task = {"experts": places, "base": str(self.inputs.base), "out": str(out), "check": check}
        return watch(sys.executable, "experts", method=method.ours, settings=method.settings, **task)

    def _copying(self, experts: int, out: Path, hashes: bool) -> dict[str, Any]:
        """Run the floor; of the inputs, the experts are hashed, as each read of a stored expert is checked."""
        places = [str(self.inputs.expert(number) / DELTA_FILE) for number in range(experts)]
        base = str(self.inputs.base / WEIGHTS)
        read, hashed = ([base], places) if hashes else ([base, *places], [])
        return watch(sys.executable, "copying", files=read, hashed=hashed, written=base, out=str(out))

    def _agreement(self, first: Path, second: Path) -> dict[str, float]:
        sides = {"first": str(first), "second": str(second), "base": str(self.inputs.base)}
        return watch(sys.executable, "comparison", **sides)["found"]

    @contextmanager
    def results(self) -> Iterator[Path]:
        """Give a folder for results, which is removed afterwards."""
        out = self.inputs.folder / "results"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        try:
            yield out
        finally:
            shutil.rmtree(out)

    def _say(self, what: str) -> None:
        print(what, file=sys.stderr, flush=True)


def medians(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Return the median of each number over the runs."""
    full = [run | {"anonymous_beyond": run["anonymous"] - run["anonymous_before"]} for run in runs]
    return {name: median(run[name] for run in full) for name in MEASURED}


def over(runs: list[dict[str, Any]], others: list[dict[str, Any]]) -> dict[str, float]:
    """Return the ratios of the medians, and the larger spread of both: the range of CPU seconds over their median."""
    one, other = medians(runs), medians(others)
    seconds = [[run["cpu"] for run in side] for side in (runs, others)]
    spread = max((max(side) - min(side)) / median(side) for side in seconds)
    ratios = {name: one[name] / other[name] for name in MEASURED if other[name] > 0}
    return ratios | ({"spread": spread} if len(runs) > 1 else {})


def growth(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return how each method's memory and time of ours grow from the fewest experts to the most."""
    found = []
    for method in dict.fromkeys(row["method"] for row in rows):
        first, *_, last = sorted((row for row in rows if row["method"] == method), key=lambda row: row["experts"])
        ratios = {name: last["ours"][name] / max(first["ours"][name], 1e-9) for name in MEASURED}
        found.append({"method": method, "experts": [first["experts"], last["experts"]], **ratios})
    return found


def measure(options: argparse.Namespace, python: Path | None) -> dict[str, Any]:
    """Return the whole report."""
    bench = Bench(options.inputs, python, options.repeats)
    methods = [method for method in METHODS if method.name in options.methods]
    most, named = max(options.experts), {method.name: method for method in methods}
    rows = [bench.merges(method, count) for count in options.experts for method in methods]
    report: dict[str, Any] = {"repeats": options.repeats, "tiny": options.tiny}
    report |= {"growth": growth(rows) if len(options.experts) > 1 else []}
    report["merges"] = [{key: value for key, value in row.items() if key != "ours"} for row in rows]
    report["floor"] = [bench.beside_the_floor(named["linear"], most)] if "linear" in named else []
    return report | {"goals": goals(report), "complete": True}


def goals(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return each goal with what was measured at the most experts, and whether it was met."""
    most = max((row["experts"] for row in report["merges"]), default=0)
    rows = {row["method"]: row for row in report["merges"] if row["experts"] == most}
    found = []
    for name, limit in CPU_GOALS.items():
        row = rows.get(name, {})
        found.append(goal(f"{name}: CPU of mergekit over ours", row.get("cpu"), limit, at_least=True))
        found.append(goal(f"{name}: peak memory of mergekit over ours", row.get("peak"), PEAK_GOAL, at_least=True))
    for row in report["growth"]:
        what = f"{row['method']}: anonymous memory of ours, {row['experts'][1]} experts over {row['experts'][0]}"
        found.append(goal(what, row["anonymous"], GROWTH_GOAL))
    for row in report["floor"]:
        what = f"{row['method']}: CPU of ours over reading, hashing and writing"
        found.append(goal(what, row["over_hashed"]["cpu"], FLOOR_GOAL))
    return found


def show(report: Mapping[str, Any]) -> None:
    """Print the report of `merge_speed.py`."""
    print_machine(report)
    if report["tiny"]:
        print("A tiny base, at which the numbers mean nothing.")
    of_both = "mergekit / ours, medians of {}; spread: range of CPU seconds over their median".format(report["repeats"])
    titles = {"experts": "experts"} | COLUMNS | {"spread": "spread"} | AGREEMENT
    if any("cpu" in row for row in report["merges"]):
        print_table(f"Sparse experts to a checkpoint: {of_both}", report["merges"], titles)
    if report["growth"]:
        span = "{1} experts over {0}".format(*report["growth"][0]["experts"])
        print_table(f"Ours: {span}", report["growth"], COLUMNS | {"anonymous_beyond": "beyond imports"})
    for row in report["floor"]:
        kinds = {"over_hashed": "/ read, hash, write", "over_read": "/ read, write", "checked_over_plain": "checked /"}
        rows = [{"method": f"ours {title}", **row[kind]} for kind, title in kinds.items()]
        print_table(f"{row['method']}, {row['experts']} experts: ours over the floor, and the check", rows, COLUMNS)
    print_goals(report["goals"])


def parse() -> tuple[Parser, argparse.Namespace]:
    names = [method.name for method in METHODS]
    parser = Parser(__doc__)
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 8, 20], help="how many are merged: 2 8 20")
    parser.add_argument("--methods", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--repeats", type=int, default=3, help="how often each merge is run: 3")
    parser.add_argument("--quick", action="store_true", help="2 and 8 experts, once")
    parser.add_argument("--tiny", action="store_true", help="a tiny base, at which the numbers mean nothing")
    peer = parser.add_mutually_exclusive_group()
    peer.add_argument("--mergekit", type=Path, metavar="PYTHON", help="the Python of an environment with mergekit")
    peer.add_argument("--alone", action="store_true", help="without mergekit: ours, its growth and the floor")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "merge-speed", help="of the inputs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to a file, too")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats} must be at least 1")
    if min(options.experts) < 1:
        parser.error(f"--experts {min(options.experts)} must be at least 1")
    if options.quick:
        options.experts, options.repeats = [2, 8], 1
    options.experts = sorted(set(options.experts))
    options.inputs = Inputs(options.folder.resolve(), TINY if options.tiny else SMOLLM2)
    return parser, options


def check_machine(parser: Parser, options: argparse.Namespace, needed: int) -> None:
    """Refuse, before anything is measured, a machine whose memory cannot be read or whose disk is too small."""
    if not Path("/proc/self/status").exists():
        parser.error("memory is read from /proc/self/status, which Linux alone has; run this on Linux")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json {options.json}: there is no directory {options.json.parent}; make it first")
    options.folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(options.folder).free
    if needed > free:
        parser.error(
            f"{options.folder} would need {needed / 1e9:.1f} GB more, and {free / 1e9:.1f} GB are free there; make "
            "room, or name another --folder"
        )


def python_of_mergekit(parser: Parser, options: argparse.Namespace) -> Path | None:
    """Return the Python that has mergekit; refuse one that lacks it."""
    if options.alone:
        return None
    python = options.mergekit or Path(sys.executable)
    command = [str(python), "-c", "import mergekit.merge"]
    if not python.exists() or subprocess.run(command, capture_output=True, check=False).returncode:
        way = f"install {MERGEKIT} there, name another with --mergekit, or measure ours with --alone"
        parser.error(f"{python} cannot import mergekit; {way}")
    return python


def main() -> None:
    parser, options = parse()
    most = max(options.experts)
    check_machine(parser, options, options.inputs.bytes_needed(most, 0 if options.alone else most))
    torch.set_num_threads(1)
    try:
        report = measure(options, python_of_mergekit(parser, options))
    except RuntimeError as error:  # from a process of its own
        sys.exit(str(error))
    output(options, report, show)


if __name__ == "__main__":
    main()
