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

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from measuring import Parser

from modular_experts.evaluation.intervals import interval
from modular_experts.reports import Results
from modular_experts.reports.results import SHARES, Facts
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
    studies = [Results.read(Path(study, RESULTS)) for study in options.studies]
    results = sum(studies[1:], studies[0])
    metric = results.main_metric
    cell = f"{{held_in[{metric}]:.1f}} / {{held_out[{metric}]:.1f}}"
    if options.beside:
        cell += " [{low:+.1f}, {high:+.1f}]"
    print(table(results, options.lines, options.columns, options.cell or cell, options.beside))


def table(results: Results, lines: str, columns: str, cell: str, beside: str | None = None) -> str:
    """Return a table of results in Markdown."""
    by_place: dict[tuple[str, str], list[Facts]] = {}
    sizes: dict[tuple[str, str], list[float]] = {}
    most = max((row["count"] or 0 for row in results.rows if row.get("task")), default=0)
    for row in results.rows:
        judged = row.get("own") or row["role"] == "held_out" or row["model"] == BASE
        place = (_name(row, lines), _name(row, columns) if columns else "")
        if row["task"] and row.get("count") in (None, most) and judged:
            by_place.setdefault(place, []).append(row)
        elif row["metric"] == SIZE:
            sizes.setdefault(place, []).append(row["value"])
    if beside is not None and beside not in {line for line, _ in by_place}:
        known = ", ".join(dict.fromkeys(line for line, _ in by_place))
        raise SystemExit(f"--beside {beside}: there is no such line; they are {known}")
    titles = list(dict.fromkeys(column for _, column in by_place))
    text = [f"| {' | '.join([lines, *titles])} |", f"|{'---|' * (1 + len(titles))}"]
    for line in dict.fromkeys(line for line, _ in by_place):
        cells = []
        for title in titles:
            rows = by_place.get((line, title))
            other = by_place.get((beside or line, title))
            kind = rows[0]["kind"] if rows else None
            alone = results.where(kind=kind, merge=None, own=True).rows
            facts = _facts(rows, other or rows, alone, results.main_metric) if rows else {}
            facts["size"] = 100 * fmean(sizes.get((line, title), [math.nan]))
            cells.append(cell.format(**facts).replace("+nan", "-").replace("nan", "-") if rows else "")
        text.append(f"| {' | '.join([line, *cells])} |")
    return "\n".join(text)


def _name(row: Facts, by: str) -> str:
    """Return the name of a row's line or column; an expert of all tasks is a kind of its own."""
    return str(row.get(by) or (ALONE if by == "merge" else row["model"]))


def _facts(
    rows: Sequence[Facts],
    other: Sequence[Facts],
    alone: Sequence[Facts],
    metric: str,
) -> dict[str, Any]:
    """Return what the template of a cell may name."""
    values = _pairs(rows, metric)
    beside = _pairs(other, metric)
    own = _pairs(alone, metric)
    span = interval([values[pair] - beside[pair] for pair in sorted(values.keys() & beside.keys())])
    low, high = span or (math.nan, math.nan)
    unit = 100 if metric in SHARES else 1
    kept = math.nan
    if values and own:
        kept = 100 * fmean(values.values()) / (fmean(own.values()) or math.nan)
    lost = {pair: own[pair] - values[pair] for pair in values.keys() & own.keys()}
    return {
        "held_in": _Means(rows, "held_in"),
        "held_out": _Means(rows, "held_out"),
        "low": unit * low,
        "high": unit * high,
        "kept": kept,
        "rank": _Ranks(alone, lost, metric),
    }


def _pairs(rows: Sequence[Facts], metric: str, role: str = "held_in") -> Pairs:
    """Return a metric by pair of seed and task."""
    return {
        (row["seed"], row["task"]): math.nan if row["value"] is None else row["value"]
        for row in rows
        if row["metric"] == metric and row["role"] == role
    }


class _Means(dict[str, float]):
    """The means of metrics, made when a template names one."""

    def __init__(self, rows: Sequence[Facts], role: str) -> None:
        super().__init__()
        self.rows = rows
        self.role = role

    def __missing__(self, metric: str) -> float:
        values = _pairs(self.rows, metric, self.role).values()
        unit = 100 if metric in SHARES else 1
        return unit * fmean(values) if values else math.nan


class _Ranks(dict[str, float]):
    """Rank correlations of a measure with what is lost, for each measure that a template names."""

    def __init__(self, alone: Sequence[Facts], lost: Pairs, metric: str) -> None:
        super().__init__()
        self.alone = alone
        sign = -1 if metric == "loss" else 1
        self.lost = {pair: sign * value for pair, value in lost.items()}

    def __missing__(self, measure: str) -> float:
        known = _pairs(self.alone, measure)
        by_seed: dict[int, list[tuple[int, str]]] = {}
        for pair in self.lost:
            by_seed.setdefault(pair[0], []).append(pair)
        ranks = []
        for pairs in by_seed.values():
            both = [pair for pair in pairs if pair in known]
            measured = torch.tensor([known[pair] for pair in both]).double()
            lost = torch.tensor([self.lost[pair] for pair in both]).double()
            ranks.append(rank_correlation(measured, lost) if both else math.nan)
        return fmean(ranks) if ranks else math.nan


def rank_correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return Spearman's correlation of two vectors, with the mean rank for equal values; 0 where one is constant."""
    ranks = torch.stack([(values[:, None] > values).double().sum(1) for values in (one, other)])
    ranks += torch.stack([(values[:, None] == values).double().sum(1) for values in (one, other)]) / 2
    ranks -= ranks.mean(1, keepdim=True)
    lengths = ranks.norm(dim=1)
    return (ranks[0] @ ranks[1] / (lengths[0] * lengths[1])).item() if lengths.all() else 0.0


if __name__ == "__main__":
    main()
