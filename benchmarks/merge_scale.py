"""How the cost of our merge grows with the number of experts and the size of the model.

Measured as in `merge_speed.py`, each merge in a process of its own on one thread: CPU seconds after the imports, and
the anonymous memory beyond them, as ratios to the first row of each table. The experts keep 5 % of each linear weight.

    python benchmarks/merge_scale.py           2 to 64 experts, three sizes, one wide layer: a quarter of an hour
    python benchmarks/merge_scale.py --quick   tiny sizes, at which the numbers mean nothing: does it run? a minute

Two things are fitted to the numbers of experts: a line, a fixed cost and one per expert, and the power of N that the
cost grows with. What twenty experts of Phi-3-mini (3.8 billion parameters) would take is arithmetic, with the bytes per
entry as measured on one layer of its width; its attention and its MLP are stored in fewer and larger weights than the
layer here, which is a Llama's. The inputs take 3 GB in `runs/merge-speed` and stay there.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import Parser
from merge_inputs import KEEP, Inputs, Shape
from merge_report import machine, print_table
from merge_speed import METHODS, ROOT, SMOLLM2, TINY, Bench, Method, check_machine, medians
from rich.console import Console

from modular_experts.library import DELTA_FILE, open_expert

SIZES = [Shape(192, 15, 512, 16384), Shape(384, 15, 1024, 32768), SMOLLM2]
PLAN = SIZES, Shape(3072, 1, 8192, 512, sharing=1), [2, 4, 8, 16, 32, 64], 8, 20
QUICK_PLAN = [TINY, Shape(128, 2, 256, 512)], Shape(256, 1, 512, 512, sharing=1), [2, 3], 2, 3
"""The sizes, the wide layer, the numbers of experts of the largest size, that of all sizes, and that of the layer."""

SHOWN = {"cpu": "CPU", "wall": "wall", "anonymous_beyond": "anonymous", "peak": "peak with files"}

PHI3_LAYERS, PHI3_VOCABULARY, PHI3_WIDTH, PHI3_FFN = 32, 32064, 3072, 8192
PHI3_WEIGHTS = [
    (3 * PHI3_WIDTH, PHI3_WIDTH),
    (PHI3_WIDTH, PHI3_WIDTH),
    (2 * PHI3_FFN, PHI3_WIDTH),
    (PHI3_WIDTH, PHI3_FFN),
]
"""The linear weights of one layer as its files hold them: qkv and gate with up are one tensor each."""

Point = tuple[Shape, int]


def planned(quick: bool) -> list[Point]:
    """Return what is measured."""
    sizes, wide, counts, few, many = QUICK_PLAN if quick else PLAN
    points = [(sizes[-1], count) for count in counts] + [(shape, few) for shape in sizes] + [(wide, many)]
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
        sizes = {"entries": row["shape"].entries, "moved": round(row["experts"] * KEEP * row["shape"].linear_entries)}
        ratios = {name: row[name] / max(rows[0][name], 1e-9) for name in SHOWN}
        found.append(named | {"experts": row["experts"]} | sizes | ratios)
    return [row | {"cpu_per_moved": row["cpu"] / row["moved"] * found[0]["moved"]} for row in found]


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


def on_paper(wide: dict[str, Any], folder: Path, experts: int) -> dict[str, float]:
    """Return what a merge of so many experts of Phi-3-mini reads, writes and holds, in bytes.

    Args:
        wide: The measured row of one wide layer and as many experts.
        folder: Of the inputs.
        experts: How many.
    """
    linear = PHI3_LAYERS * sum(math.prod(shape) for shape in PHI3_WEIGHTS)
    checkpoint = 2 * (linear + 2 * PHI3_VOCABULARY * PHI3_WIDTH)
    sample = Inputs(folder, wide["shape"]).expert(0)
    per_entry = (sample / DELTA_FILE).stat().st_size / sum(open_expert(sample).kept_entries().values())
    largest = max(math.prod(shape) for shape in PHI3_WEIGHTS)
    held = wide["anonymous_beyond"] / wide["shape"].largest_weight
    return {
        "experts": experts,
        "bytes_per_kept_entry": per_entry,
        "read_experts": experts * KEEP * linear * per_entry,
        "read_base": checkpoint,
        "written": checkpoint,
        "read_if_full_checkpoints": (experts + 1) * checkpoint,
        "largest_weight_entries": largest,
        "held_bytes_per_entry_of_it": held,
        "peak_beyond_imports": held * largest,
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return the whole report."""
    sizes, wide, _, few, many = QUICK_PLAN if options.quick else PLAN
    folder, points = options.folder.resolve(), planned(options.quick)
    report: dict[str, Any] = {"machine": machine(), "quick": options.quick, "keep": KEEP}
    report |= {"repeats": options.repeats, "methods": {}}
    for method in [method for method in METHODS if method.name in options.methods]:
        rows = measured(points, method, folder, options.repeats)
        by_count = relative([row for row in rows if row["shape"] == sizes[-1]], "{experts} experts")
        of_sizes = [row for shape in sizes for row in rows if row["shape"] == shape and row["experts"] == few]
        of_wide = next(row for row in rows if row["shape"] == wide)
        beside = min((row for row in rows if row["shape"] == sizes[-1]), key=lambda row: abs(row["experts"] - many))
        report["methods"][method.name] = {
            "by_experts": by_count,
            "fit": {"cpu": fitted(by_count, "cpu"), "anonymous_beyond": fitted(by_count, "anonymous_beyond")},
            "by_size": relative(of_sizes, "{millions:.3g} M, {experts} experts"),
            "wide_layer": relative([beside, of_wide], "{millions:.3g} M, {experts} experts"),
            "on_paper": on_paper(of_wide, folder, many),
        }
    return report | {"complete": True}


def show(report: dict[str, Any]) -> None:
    """Print the tables."""
    console = Console(width=140)
    console.print(", ".join(f"{key} {value}" for key, value in report["machine"].items()), highlight=False)
    if report["quick"]:
        console.print("A quick run, of sizes at which the numbers mean nothing.")
    for name, found in report["methods"].items():
        print_table(console, f"{name}: over the fewest experts", found["by_experts"], SHOWN)
        for column, fit in found["fit"].items():
            console.print(
                f"{SHOWN[column]}: {fit['fixed']:.3f} + {fit['each']:.3f} N (off by at most "
                f"{fit['largest_error']:.0%}); it grows with the {fit['power']:.2f}th power of N",
                highlight=False,
            )
        sizes = {"entries": "entries", **SHOWN}
        print_table(console, f"{name}: over the smallest model", found["by_size"], sizes)
        title = f"{name}: one layer as wide as Phi-3-mini's, over the largest model with about as many experts"
        columns = {"entries": "entries", "moved": "moved entries", "cpu_per_moved": "CPU per moved", **SHOWN}
        print_table(console, title, found["wide_layer"], columns)
        _show_paper(console, name, found["on_paper"])
    console.print("Wall clock means little on a busy machine; compare CPU and memory. The table is complete.")


def _show_paper(console: Console, name: str, paper: dict[str, float]) -> None:
    lines = {
        "read of the base, GB": paper["read_base"] / 1e9,
        "read of the experts, GB": paper["read_experts"] / 1e9,
        "bytes per kept entry, as measured": paper["bytes_per_kept_entry"],
        "read if all were full checkpoints, GB": paper["read_if_full_checkpoints"] / 1e9,
        "written, GB": paper["written"] / 1e9,
        "entries of the largest weight, millions": paper["largest_weight_entries"] / 1e6,
        "bytes held per entry of it, as measured": paper["held_bytes_per_entry_of_it"],
        "peak beyond the imports, GB": paper["peak_beyond_imports"] / 1e9,
    }
    rows = [{"method": what, "value": value} for what, value in lines.items()]
    print_table(
        console, f"{name}: {paper['experts']} experts of Phi-3-mini at {KEEP:.0%}, on paper", rows, {"value": ""}
    )


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
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    show(report)


if __name__ == "__main__":
    main()
