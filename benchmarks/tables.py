"""Print what studies measured as a table in Markdown: a line for each merge, a column for each kind of experts.

A cell is a template of Python's `str.format`. It may name, as means over tasks and seeds, shares in per cent:

    {held_in[exact_match]} {held_in[loss]}  a metric on the tasks of the experts, each single expert on its own task
    {held_out[exact_match]}                 the same on tasks that no expert saw
    {kept}                                  the main metric held in, as a share of what the single experts have
    {size}                                  bytes of all experts in use over one bfloat16 copy of the weights they move
    {low} {high}                            the 95 % interval of the difference to the line of `--beside`, held in: a
                                            bootstrap over pairs of seed and task
    {rank[overlap]}                         Spearman's correlation over tasks between a measure of the study and what
                                            a merge takes from the task, as a mean over seeds

    python benchmarks/tables.py runs/merging [runs/more ...] [--lines merge] [--columns kind] [--beside SparseAverage]
    python benchmarks/tables.py runs/training --lines kind --columns merge --cell '{held_in[exact_match]:.1f}'

Where a study merges 2, 5 and all experts, the merges of all count. `--columns ''` gives one column.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from measuring import Parser

from modular_experts.evaluation.intervals import interval
from modular_experts.reports import Results
from modular_experts.reports.results import SHARES
from modular_experts.study.plan import BASE
from modular_experts.study.results import RESULTS, SIZE

ALONE = "alone"
Pairs = Mapping[tuple[int, str], float]


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("studies", nargs="+", help="directories of studies, whose numbers stand in one table")
    parser.add_argument("--lines", default="merge", choices=["merge", "kind"])
    parser.add_argument("--columns", default="kind", choices=["merge", "kind", ""])
    parser.add_argument("--cell", help="template of a cell")
    parser.add_argument("--beside", help="the line that others are compared with")
    options = parser.parse_args()
    usual = "{held_in[%s]:.1f} / {held_out[%s]:.1f}" + " [{low:+.1f}, {high:+.1f}]" * bool(options.beside)
    found = [Results.read(Path(study, RESULTS)) for study in options.studies]
    results = sum(found[1:], found[0])
    metric = results.main_metric
    print(table(results, options.lines, options.columns, options.cell or usual.replace("%s", metric), options.beside))


def table(results: Results, lines: str, columns: str, cell: str, beside: str | None = None) -> str:
    """Return a table of results in Markdown."""
    by_place: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    sizes: dict[tuple[str, str], list[float]] = {}
    most = max((row["count"] or 0 for row in results.rows if row.get("task")), default=0)
    for row in results.rows:
        judged = row.get("own") or row["role"] == "held_out" or row["model"] == BASE
        if row["task"] and row.get("count") in (None, most) and judged:
            place = _name(row, lines), _name(row, columns) if columns else ""
            by_place.setdefault(place, []).append(row)
        elif row["metric"] == SIZE:
            sizes.setdefault((_name(row, lines), _name(row, columns) if columns else ""), []).append(row["value"])
    if beside is not None and beside not in {line for line, _ in by_place}:
        known = ", ".join(dict.fromkeys(line for line, _ in by_place))
        raise SystemExit(f"--beside {beside}: there is no such line; they are {known}")
    titles = list(dict.fromkeys(column for _, column in by_place))
    text = [f"| {' | '.join([lines, *titles])} |", "|---" * (1 + len(titles)) + "|"]
    for line in dict.fromkeys(line for line, _ in by_place):
        cells = []
        for title in titles:
            rows, other = by_place.get((line, title)), by_place.get((beside or line, title))
            kind = rows[0]["kind"] if rows else None
            alone = results.where(kind=kind, merge=None, own=True).rows
            facts = _facts(rows, other or rows, alone, results.main_metric) if rows else {}
            facts["size"] = 100 * fmean(sizes.get((line, title), [float("nan")]))
            cells.append(cell.format(**facts).replace("+nan", "-").replace("nan", "-") if rows else "")
        text.append(f"| {' | '.join([line, *cells])} |")
    return "\n".join(text)


def _name(row: Mapping[str, Any], by: str) -> str:
    """Return the name of a row's line or column; an expert of all tasks is a kind of its own."""
    return str(row.get(by) or (ALONE if by == "merge" else row["model"]))


def _facts(
    rows: Sequence[Mapping[str, Any]],
    other: Sequence[Mapping[str, Any]],
    alone: Sequence[Mapping[str, Any]],
    metric: str,
) -> dict[str, Any]:
    """Return what the template of a cell may name."""
    found: dict[str, Any] = {role: _Means(rows, role) for role in ("held_in", "held_out")}
    mine, theirs, own = (_pairs(group, metric) for group in (rows, other, alone))
    both = sorted(mine.keys() & theirs.keys())
    low, high = (interval([mine[pair] - theirs[pair] for pair in both]) if both else None) or (float("nan"),) * 2
    unit = 100 if metric in SHARES else 1
    found |= {"low": unit * low, "high": unit * high}
    found["kept"] = 100 * fmean(mine.values()) / (fmean(own.values()) or float("nan")) if mine and own else float("nan")
    return found | {"rank": _Ranks(alone, {pair: own[pair] - mine[pair] for pair in mine.keys() & own.keys()}, metric)}


def _pairs(rows: Sequence[Mapping[str, Any]], metric: str, role: str = "held_in") -> Pairs:
    """Return a metric by pair of seed and task."""
    return {
        (row["seed"], row["task"]): float("nan") if row["value"] is None else row["value"]
        for row in rows
        if row["metric"] == metric and row["role"] == role
    }


class _Means(dict[str, float]):
    """The means of metrics, made when a template names one."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], role: str) -> None:
        super().__init__()
        self.rows, self.role = rows, role

    def __missing__(self, metric: str) -> float:
        values = _pairs(self.rows, metric, self.role).values()
        return (100 if metric in SHARES else 1) * fmean(values) if values else float("nan")


class _Ranks(dict[str, float]):
    """Rank correlations of a measure with what is lost, for each measure that a template names."""

    def __init__(self, alone: Sequence[Mapping[str, Any]], lost: Pairs, metric: str) -> None:
        super().__init__()
        self.alone, self.sign = alone, -1 if metric == "loss" else 1
        self.lost = {pair: self.sign * value for pair, value in lost.items()}

    def __missing__(self, measure: str) -> float:
        known = _pairs(self.alone, measure)
        found = []
        for seed in dict.fromkeys(seed for seed, _ in self.lost):
            both = [pair for pair in self.lost if pair[0] == seed and pair in known]
            sides = [torch.tensor([of[pair] for pair in both]).double() for of in (known, self.lost)]
            found.append(rank_correlation(*sides) if both else float("nan"))
        return fmean(found) if found else float("nan")


def rank_correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return Spearman's correlation of two vectors, with the mean rank for equal values; 0 where one is constant."""
    ranks = torch.stack([(values[:, None] > values).double().sum(1) for values in (one, other)])
    ranks += torch.stack([(values[:, None] == values).double().sum(1) for values in (one, other)]) / 2
    ranks -= ranks.mean(1, keepdim=True)
    lengths = ranks.norm(dim=1)
    return (ranks[0] @ ranks[1] / (lengths[0] * lengths[1])).item() if lengths.all() else 0.0


if __name__ == "__main__":
    main()
