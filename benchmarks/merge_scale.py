"""How the cost of our merge grows with the number of experts and the size of the model.

Measured as in `merge_speed.py`, each merge in a process of its own on one thread: CPU seconds after the imports, and
the anonymous memory beyond them, as ratios to the first row of each table. The experts keep 5 % of each linear weight.

    python benchmarks/merge_scale.py           2 to 64 experts, three sizes: a quarter of an hour
    python benchmarks/merge_scale.py --quick   tiny sizes, at which the numbers mean nothing: does it run? a minute

Two things are fitted to the numbers of experts: a line, a fixed cost and one per expert, and the power of N that the
cost grows with. The inputs take 3 GB in `runs/merge-speed` and stay there.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import Parser, output, print_machine, print_table
from merge_inputs import KEEP, Inputs, Shape
from merge_speed import METHODS, ROOT, SMOLLM2, TINY, Bench, Method, check_machine, medians

SIZES = [Shape(192, 15, 512, 16384), Shape(384, 15, 1024, 32768), SMOLLM2]
PLAN = SIZES, [2, 4, 8, 16, 32, 64], 8
QUICK_PLAN = [TINY, Shape(128, 2, 256, 512)], [2, 3], 2
"""The sizes, the numbers of experts of the largest size, and the number of experts of all sizes."""

SHOWN = {"cpu": "CPU", "anonymous_beyond": "anonymous", "peak": "peak with files"}

Point = tuple[Shape, int]


def planned(quick: bool) -> list[Point]:
    """Return what is measured."""
    sizes, counts, few = QUICK_PLAN if quick else PLAN
    points = [(sizes[-1], count) for count in counts] + [(shape, few) for shape in sizes]
    return list(dict.fromkeys(points))


def measured(points: Sequence[Point], method: Method, folder: Path, repeats: int) -> list[dict[str, Any]]:
    """Return a row per point, a shape and a number of experts; the points take turns."""
    benches = {shape: Bench(Inputs(folder, shape), None, repeats) for shape, _ in points}
    runs: dict[Point, list[dict[str, Any]]] = {point: [] for point in points}
    for round_ in range(repeats):
        for shape, experts in points:
            what = f"{method.name}, {shape.entries / 1e6:.0f} M, {experts} experts, {round_ + 1} of {repeats}"
            print(what, file=sys.stderr, flush=True)
            with benches[shape].results() as out:
                runs[shape, experts].append(benches[shape].by_experts(method, experts, out / "ours"))
    return [{"shape": shape, "experts": experts, **medians(found)} for (shape, experts), found in runs.items()]


def relative(rows: list[dict[str, Any]], title: str) -> list[dict[str, Any]]:
    """Return the rows over the first one, each named as the title says."""
    found = []
    for row in rows:
        named = {"method": title.format(millions=row["shape"].entries / 1e6, experts=row["experts"])}
        ratios = {name: row[name] / max(rows[0][name], 1e-9) for name in SHOWN}
        found.append(named | {"experts": row["experts"], "entries": row["shape"].entries} | ratios)
    return found


def fitted(rows: list[dict[str, Any]], column: str) -> dict[str, float]:
    """Return what fits a column of the rows of `relative` best: `fixed + each * experts`, and the power of experts.

    Least squares: of the relative errors in the first, of the logarithms in the second.
    """
    counts = torch.tensor([float(row["experts"]) for row in rows], dtype=torch.float64)
    values = torch.tensor([row[column] for row in rows], dtype=torch.float64)
    line = torch.stack([torch.ones_like(counts), counts], 1)
    weights = 1 / values[:, None]
    fixed, each = torch.linalg.lstsq(line * weights, values[:, None] * weights).solution.flatten().tolist()
    logs = torch.stack([torch.ones_like(counts), counts.log()], 1)
    power = torch.linalg.lstsq(logs, values.log()[:, None]).solution[1].item()
    error = ((fixed + each * counts) / values - 1).abs().max().item()
    return {"fixed": fixed, "each": each, "largest_error": error, "power": power}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the whole report."""
    sizes, _, few = QUICK_PLAN if options.quick else PLAN
    folder, points = options.folder.resolve(), planned(options.quick)
    report: dict[str, Any] = {"keep": KEEP}
    report |= {"repeats": options.repeats, "methods": {}}
    for method in [method for method in METHODS if method.name in options.methods]:
        rows = measured(points, method, folder, options.repeats)
        by_count = relative([row for row in rows if row["shape"] == sizes[-1]], "{experts} experts")
        of_sizes = [row for shape in sizes for row in rows if row["shape"] == shape and row["experts"] == few]
        report["methods"][method.name] = {
            "by_experts": by_count,
            "fit": {"cpu": fitted(by_count, "cpu"), "anonymous_beyond": fitted(by_count, "anonymous_beyond")},
            "by_size": relative(of_sizes, "{millions:.3g} M, {experts} experts"),
        }
    return report | {"complete": True}


def show(report: dict[str, Any]) -> None:
    """Print the tables."""
    print_machine(report)
    if report["quick"]:
        print("A quick run, of sizes at which the numbers mean nothing.")
    for name, found in report["methods"].items():
        print_table(f"{name}: over the fewest experts", found["by_experts"], SHOWN)
        for column, fit in found["fit"].items():
            line = f"{SHOWN[column]}: {fit['fixed']:.3f} + {fit['each']:.3f} N"
            print(f"\n{line} (off by at most {fit['largest_error']:.0%}), or the {fit['power']:.2f}th power of N")
        print_table(f"{name}: over the smallest model", found["by_size"], {"entries": "entries", **SHOWN})


def parse() -> tuple[Parser, argparse.Namespace]:
    names = [method.name for method in METHODS]
    parser = Parser(__doc__)
    parser.add_argument("--methods", nargs="+", choices=names, default=["linear", "ties"], help=", ".join(names))
    parser.add_argument("--repeats", type=int, default=3, help="how often each merge is run: 3")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, once")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "merge-speed", help="of the inputs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to a file, too")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats} must be at least 1")
    options.repeats = 1 if options.quick else options.repeats
    return parser, options


def main() -> None:
    parser, options = parse()
    needed = [Inputs(options.folder, shape).bytes_needed(experts, 0) for shape, experts in planned(options.quick)]
    check_machine(parser, options, sum(needed))
    torch.set_num_threads(1)
    try:
        report = measure(options)
    except RuntimeError as error:  # from a process of its own
        sys.exit(str(error))
    output(options, report, show)


if __name__ == "__main__":
    main()
