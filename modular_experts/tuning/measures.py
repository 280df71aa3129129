"""Measure what a search of coefficients lowers: the loss, the entropy, or the distance to each task's own expert.

Each measure takes a model and a batch, and returns a sum and a count for each row, whose ratio is lowered. The loss is
`evaluation.batch_losses`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from modular_experts.data.batch import Batch
from modular_experts.evaluation import answer_logits, batch_losses, row_sums

Aim = Literal["loss", "entropy", "distill"]
Measure = Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]

KEPT_TOKENS = 256
"""How many likeliest tokens of a prediction are kept: of a larger vocabulary the others count as one token."""


def batch_entropies(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return each row's summed entropy in nats where it predicts its target, and the number of target tokens."""
    logits, _ = answer_logits(model, batch)
    likelihoods = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return row_sums(batch, -(likelihoods.exp() * likelihoods).sum(-1))


class Prediction(NamedTuple):
    """What a model predicts at `m` places: ids of the likeliest tokens `(m, k)`, and the log-likelihoods `(m, k + 1)`
    of these and of all others together, or `(m, k)` if there are no others.
    """

    ids: Tensor
    likelihoods: Tensor


def prediction(logits: Tensor, kept: int = KEPT_TOKENS) -> Prediction:
    """Return the prediction that logits `(m, vocabulary)` make, of the likeliest `kept` tokens and the others."""
    ids = logits.topk(min(kept, logits.shape[-1])).indices
    return Prediction(ids.int(), _log_likelihoods(logits, ids))


def batch_divergences(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return each row's summed divergence from the prediction of its task's own expert, and its number of tokens.

    At a place where the expert gives the tokens the likelihoods p, and the model q, it is `KL(p || q) = sum_v p_v (log
    p_v - log q_v)` in nats. Tokens that `Prediction` counts as one are one `v`, which never raises it, and keeps it
    0 where q = p. `Objective.remember` puts the prediction into the batch.
    """
    expert: Prediction = batch["prediction"]
    likelihoods = _log_likelihoods(answer_logits(model, batch)[0], expert.ids.long())
    # An expert that excludes a token gives it no share of the sum.
    terms = torch.where(expert.likelihoods > -torch.inf, expert.likelihoods - likelihoods, 0)
    return row_sums(batch, (expert.likelihoods.exp() * terms).sum(-1))


def _log_likelihoods(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the log-likelihoods of the tokens `ids` `(m, k)`, and of all others together if there are others."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chosen = logits.gather(-1, ids)
    if ids.shape[-1] < logits.shape[-1]:
        others = logits.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        chosen = torch.cat([chosen, others], -1)
    # The parts add up to one exactly, whatever rounding did to them.
    return chosen.log_softmax(-1)


MEASURES: dict[Aim, Measure] = {"loss": batch_losses, "entropy": batch_entropies, "distill": batch_divergences}


def check_aim(search: str, objective: str) -> None:
    """Raise ValueError if a search is given an objective that it does not know."""
    if objective not in MEASURES:
        raise ValueError(f"{search}: objective must be 'loss', 'entropy' or 'distill', got {objective!r}")
