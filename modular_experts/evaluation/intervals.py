"""Tell how sure a mean over test rows is, and which models lead, by a bootstrap whose draws are always the same."""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from statistics import NormalDist, fmean
from typing import Any

import torch
from torch import Tensor

from modular_experts.reports.results import better

DRAWS = 500
_NORMAL = NormalDist().inv_cdf(0.975)


def interval(values: Sequence[float], per: Sequence[float] = ()) -> list[float] | None:
    """Return the 95 % interval of a mean by the bootstrap, if `drawn_means` of these are finite, else None."""
    return ends(drawn_means(values, per=per))


def share_interval(*tasks: Sequence[float]) -> list[float] | None:
    """Return the 95 % interval of a mean over tasks whose rows are right or wrong; None if a value is not 0 or 1.

    It is Wilson's (1927), which has a width also where all rows are alike; of several tasks, their distances from the
    shares are joined by squares (Newcombe, 1998).
    """
    if {value for values in tasks for value in values} - {0.0, 1.0}:
        return None
    shares, below, above = [fmean(values) for values in tasks], 0.0, 0.0
    for share, values in zip(shares, tasks, strict=True):
        unsure = _NORMAL**2 / len(values)
        middle = (share + unsure / 2) / (1 + unsure)
        half = math.sqrt(unsure * share * (1 - share) + unsure**2 / 4) / (1 + unsure)
        below, above = below + (share - middle + half) ** 2, above + (middle + half - share) ** 2
    mean = fmean(shares)
    return [mean - math.sqrt(below) / len(tasks), mean + math.sqrt(above) / len(tasks)]


def drawn_means(values: Sequence[float], seed: int = 0, per: Sequence[float] = ()) -> Tensor:
    """Return the means `(DRAWS,)` of rows that are drawn with replacement, the same rows for each model.

    With `per`, such as the tokens of each row, it is the sum of the values over the sum of these. One row tells nothing
    about others, so its means are NaN.
    """
    if len(values) < 2:
        return torch.full((DRAWS,), math.nan)
    draws = _draws(len(values), seed)
    means = torch.tensor(values)[draws].mean(1)
    return means / torch.tensor(per, dtype=means.dtype)[draws].mean(1) if per else means


def ends(means: Tensor) -> list[float] | None:
    """Return the 95 % interval of drawn means; None if one is not finite."""
    if not means.isfinite().all():
        return None
    return [means.quantile(0.025).item(), means.quantile(0.975).item()]


def _leaders(drawn: Mapping[str, Tensor], values: Mapping[str, float], low_is_best: bool) -> list[str]:
    """Return the best model and those that are level with it: the interval of the paired difference contains zero."""
    finite = [model for model, value in values.items() if math.isfinite(value)]
    best = (min if low_is_best else max)(finite, key=values.__getitem__, default="")
    spans = {model: ends(drawn[model] - drawn[best]) for model in finite}
    return [model for model, span in spans.items() if span and span[0] <= 0.0 <= span[1]]


def compared_means(
    rows: Sequence[dict[str, Any]], values: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]
) -> list[dict[str, Any]]:
    """Give each row of `Results` its 95 % `interval`, and tell whether its model `leads` where another is worse.

    `values` are `TaskScores.values` by model. The same comes back for each model's means over the tasks of a role.
    """
    groups: dict[tuple, dict[str, list[dict[str, Any]]]] = {}
    drawn: dict[int, Tensor] = {}
    for row in rows:
        by_task = values[row["model"]]
        own, seed = by_task[row["task"]], [*by_task].index(row["task"])  # each task draws its own rows
        drawn[id(row)] = drawn_means(own[row["metric"]], seed, own["tokens"] if row["metric"] == "loss" else ())
        for task in (row["task"], None):
            group = groups.setdefault((row["role"], task, row["metric"]), {})
            group.setdefault(row["model"], []).append(row)
    found = []
    for (role, task, metric), models in groups.items():
        values_of = {one: [row["value"] for row in mine] for one, mine in models.items()}
        known = {one: math.nan if None in mine else fmean(mine) for one, mine in values_of.items()}
        means = {one: torch.stack([drawn[id(row)] for row in mine]).mean(0) for one, mine in models.items()}
        leading = _leaders(means, known, metric == "loss") if better(metric) else []
        for model, mine in models.items():
            several = [values[model][row["task"]][metric] for row in mine]
            of_shares = None if metric == "loss" else share_interval(*several)
            about: dict[str, Any] = {"interval": of_shares or ends(means[model])}
            about["leads"] = model in leading and len(leading) < len(models)
            if task is None:
                found.append({"model": model, "role": role, "metric": metric, "value": known[model], **about})
            else:
                mine[0].update(about)
    return found


@lru_cache(64)
def _draws(rows: int, seed: int) -> Tensor:
    return torch.randint(rows, (DRAWS, rows), generator=torch.Generator().manual_seed(seed))
