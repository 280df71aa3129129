"""Whether what `interference` shows before a merge tells which experts will lose by it.

Experts and results are those of `merge_quality`, in `--work`. For each merge as it comes, at its default settings, each
measure of an expert is compared with what its task loses: exact match and loss of the merge against those of the expert
alone. Shown is Spearman's rank correlation over the tasks, its mean over the seeds and, in brackets, its least and
largest. A good warning has a correlation near 1: the higher the measure, the greater the loss.

    python benchmarks/merge_quality.py --methods SparseAverage SelfRegMean
    python benchmarks/merges_predicted.py [--kinds sparse ...] [--methods SparseAverage SelfRegMean] [--seeds 0 1 2]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from merge_methods import METHODS
from merge_worlds import Experts, SuiteExperts
from torch import Tensor

from modular_experts.jobs import JSONLines
from modular_experts.merger.interference import Sums, interference, mean_of_others

MEASURES: Mapping[str, Any] = {
    "distance": lambda sums: sums.distance,
    "cosine, mean with others (negated)": lambda sums: -mean_of_others(sums.cosine),
    "overlap, mean with others": lambda sums: mean_of_others(sums.overlap),
    "conflict, mean with others": lambda sums: mean_of_others(sums.conflict),
    "energy (negated)": lambda sums: -sums.products.diagonal(),
}


def main() -> None:
    options = _options()
    work = Path(options.work)
    singles, merges = JSONLines(work / "singles.jsonl"), JSONLines(work / "merges.jsonl")
    rows = []
    wanted = [(seed, kind, method) for seed in options.seeds for kind in options.kinds for method in options.methods]
    if missing := [key for key in wanted if key not in merges]:
        seed, kind, method = missing[0]
        sys.exit(f"{work} has no merge by {method} of {kind}, seed {seed}; first run merge_quality.py --work {work}")
    for kind in options.kinds:
        for method in options.methods:
            found = [_correlations(SuiteExperts(seed, work), kind, method, singles, merges) for seed in options.seeds]
            for measure in MEASURES:
                by_score = {score: [one[measure, score] for one in found] for score in ("exact_match", "loss")}
                rows.append({"kind": kind, "method": method, "measure": measure, **by_score})
                print(f"{kind}, {method}, {measure}", file=sys.stderr, flush=True)
    if options.json:
        json.dump({"seeds": options.seeds, "rows": rows}, sys.stdout, indent=2)
        return
    print("| kind | merge | measure | exact match lost | loss gained |\n|---|---|---|---|---|")
    for row in rows:
        cells = [_text(row[score]) for score in ("exact_match", "loss")]
        print("| " + " | ".join([row["kind"], row["method"], row["measure"], *cells]) + " |")


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Return Spearman's correlation of two vectors, with the mean rank for equal values; 0 where one is constant."""
    ranks = torch.stack([(values[:, None] > values).double().sum(1) for values in (one, other)])
    ranks += torch.stack([(values[:, None] == values).double().sum(1) for values in (one, other)]) / 2
    ranks -= ranks.mean(1, keepdim=True)
    lengths = ranks.norm(dim=1)
    return (ranks[0] @ ranks[1] / (lengths[0] * lengths[1])).item() if lengths.all() else 0.0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = list(Experts.kinds)
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["SparseAverage", "SelfRegMean"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", default="runs/merge-quality", help="where merge_quality keeps experts and results")
    parser.add_argument("--json", action="store_true", help="print only JSON")
    return parser.parse_args()


def _correlations(
    world: Experts, kind: str, name: str, singles: JSONLines, merges: JSONLines
) -> dict[tuple[str, str], float]:
    """Return the correlation of each measure with what is lost, by measure and score."""
    tasks, seed = world.tasks, world.seed
    sums: Sums = interference([world.expert(kind, task) for task in tasks], METHODS[name].method).total
    merged = merges[seed, kind, name]["plain"]
    found: dict[tuple[str, str], float] = {}
    for score, sign in {"exact_match": -1.0, "loss": 1.0}.items():
        alone = [singles[seed, kind, task]["tested"][score][task] for task in tasks]
        lost = torch.tensor([sign * (merged[score][t] - own) for t, own in zip(tasks, alone, strict=True)]).double()
        found |= {(measure, score): rank_correlation(of(sums), lost) for measure, of in MEASURES.items()}
    return found


def _text(values: Sequence[float]) -> str:
    return f"{fmean(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


if __name__ == "__main__":
    main()
