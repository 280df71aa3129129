"""Tell how sure a mean over test rows is, and which models lead, by a bootstrap whose draws are always the same."""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from statistics import NormalDist, fmean

import torch
from torch import Tensor

from modular_experts.reports.results import MutableFacts, better

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
    shares = [fmean(values) for values in tasks]
    below = 0.0
    above = 0.0
    for share, values in zip(shares, tasks, strict=True):
        unsure = _NORMAL**2 / len(values)
        middle = (share + unsure / 2) / (1 + unsure)
        half = math.sqrt(unsure * share * (1 - share) + unsure**2 / 4) / (1 + unsure)
        below += (share - middle + half) ** 2
        above += (middle + half - share) ** 2
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
    rows: Sequence[MutableFacts], values: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]
) -> list[MutableFacts]:
    """Give each row of `Results` its 95 % `interval`, and tell whether its model `leads` where another is worse.

    `values` are `TaskScores.values` by model. The same comes back for each model's means over the tasks of a role.
    """
    # The rows of each model by role, task and metric; without a task, the rows of all tasks of the role.
    groups: dict[tuple[str, str | None, str], dict[str, list[MutableFacts]]] = {}
    drawn: dict[int, Tensor] = {}
    for row in rows:
        by_task = values[row["model"]]
        own = by_task[row["task"]]
        seed = list(by_task).index(row["task"])  # each task draws its own rows
        drawn[id(row)] = drawn_means(own[row["metric"]], seed, own["tokens"] if row["metric"] == "loss" else ())
        for task in (row["task"], None):
            group = groups.setdefault((row["role"], task, row["metric"]), {})
            group.setdefault(row["model"], []).append(row)
    means_of_roles = []
    for (role, task, metric), models in groups.items():
        means = {}
        drawn_of = {}
        for model, own_rows in models.items():
            scores = [row["value"] for row in own_rows]
            means[model] = math.nan if None in scores else fmean(scores)
            drawn_of[model] = torch.stack([drawn[id(row)] for row in own_rows]).mean(0)
        leading = _leaders(drawn_of, means, metric == "loss") if better(metric) else []
        for model, own_rows in models.items():
            by_row = [values[model][row["task"]][metric] for row in own_rows]
            of_shares = None if metric == "loss" else share_interval(*by_row)
            about: MutableFacts = {
                "interval": of_shares or ends(drawn_of[model]),
                "leads": model in leading and len(leading) < len(models),
            }
            if task is None:
                mean = {"model": model, "role": role, "metric": metric, "value": means[model]}
                means_of_roles.append(mean | about)
            else:
                own_rows[0].update(about)
    return means_of_roles


@lru_cache(64)
def _draws(rows: int, seed: int) -> Tensor:
    return torch.randint(rows, (DRAWS, rows), generator=torch.Generator().manual_seed(seed))
