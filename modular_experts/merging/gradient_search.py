"""Find coefficients with Adam on validation rows: AdaMerging and aTLAS."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from modular_experts.data.batch import IGNORED, Batch
from modular_experts.merging.combination import Combination
from modular_experts.merging.objective import MEASURES, Aim, Measure, Objective, Prediction, Trial
from modular_experts.merging.search import CoefficientSearch, Found
from modular_experts.methods.settings import Checks, above, at_least, finite, one_of
from modular_experts.progress import Counted, Progress

Per = Literal["expert", "weight", "row"]
"""What has a coefficient of its own: each expert, each weight of it, or each row of each weight of it."""

PASS_TOKENS = 2048
"""The most tokens, padding among them, of the tasks that share a forward and a backward pass."""


def descend(
    combination: Combination,
    objective: Objective,
    measured: Measure,
    start: Tensor,
    learning_rate: float,
    steps: int,
    progress: Progress = iter,
    bounds: tuple[float, float] | None = None,
    decay: bool = False,
) -> tuple[Tensor, list[Trial]]:
    """Return the coefficients after some steps of Adam from `start`, and each step; leave the model at the result.

    Each step takes the next batch of every task, in turn, and clamps each coefficient into `bounds`; with `decay` the
    rate falls linearly to 0. Tasks share passes (`joint`), because the inner product with every expert costs the same
    for one task and for many.
    """
    model = objective.model
    batches = objective.batches
    coefficients = nn.Parameter(start.clone())
    optimizer = torch.optim.Adam([coefficients], lr=learning_rate)
    # One row of coefficients, of the experts, stands for all weights.
    shape = (max(len(start), len(combination.names)), combination.experts)
    trials: list[Trial] = []
    with combination.gradients(len(start) > len(combination.names)) as gathered, _quick_attention(model):
        for step in progress(Counted(range(steps), "steps")):
            combination.move_to(coefficients.detach().expand(shape))
            gathered.zero_()
            losses = dict.fromkeys(batches, 0.0)
            for batch in joint([own[step % len(own)] for own in batches.values()]):
                means = _means_by_task(batch, *measured(model, batch))
                (torch.stack([*means.values()]).sum() / len(batches)).backward()
                losses |= {task: loss.item() for task, loss in means.items()}
            coefficients.grad = gathered.clone() if len(coefficients) > 1 else gathered.sum(0, keepdim=True)
            if decay:
                optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
            optimizer.step()
            if bounds:
                coefficients.data.clamp_(*bounds)
            trials.append(Trial({"step": step}, losses))
    best = coefficients.detach().expand(shape).clone()
    combination.move_to(best)
    return best, trials


def _quick_attention(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Return a context in which a step is quick: on a CPU the backward of fused attention is slow in bfloat16."""
    if model.device.type == "cpu" and model.dtype == torch.bfloat16:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def _means_by_task(batch: Batch, sums: Tensor, counts: Tensor) -> dict[str, Tensor]:
    """Return the mean of each task in a batch of several, over the sums and counts of its rows."""
    means: dict[str, Tensor] = {}
    for task in dict.fromkeys(batch["task"]):
        own = torch.tensor([name == task for name in batch["task"]], device=sums.device)
        means[task] = sums[own].sum() / counts[own].sum()
    return means


def first_coefficients(combination: Combination, per: Per, first: Sequence[float]) -> Tensor:
    """Return the float64 coefficients where a search starts: `first` for the first experts, 0 for the others."""
    count = {"expert": 1, "weight": len(combination.names), "row": sum(combination.rows)}[per]
    start = torch.zeros(count, combination.experts, dtype=torch.float64)
    start[:, : len(first)] = torch.tensor(first, dtype=torch.float64)
    return start


def joint(batches: Sequence[Batch], tokens: int = PASS_TOKENS) -> list[Batch]:
    """Join padded batches, the shortest rows first, up to `tokens` tokens together; a larger batch stays alone."""
    groups: list[list[Batch]] = []
    rows = 0
    for batch in sorted(batches, key=lambda batch: batch["input_ids"].shape[1]):
        rows += len(batch["task"])
        if not groups or rows * batch["input_ids"].shape[1] > tokens:
            groups.append([])
            rows = len(batch["task"])
        groups[-1].append(batch)
    return [_joined(group) if len(group) > 1 else group[0] for group in groups]


def _joined(batches: Sequence[Batch]) -> Batch:
    length = max(batch["input_ids"].shape[1] for batch in batches)
    joined: Batch = {"task": [task for batch in batches for task in batch["task"]]}
    for name, padding in (("input_ids", 0), ("attention_mask", 0), ("labels", IGNORED)):
        parts = [F.pad(batch[name], (0, length - batch[name].shape[1]), value=padding) for batch in batches]
        joined[name] = torch.cat(parts)
    if "states" in batches[0]:
        states = [F.pad(batch["states"], (0, 0, 0, 0, 0, length - batch["states"].shape[1])) for batch in batches]
        joined["states"] = torch.cat(states)
    if "prediction" in batches[0]:
        columns = zip(*(batch["prediction"] for batch in batches), strict=True)
        joined["prediction"] = Prediction(*map(torch.cat, columns))
    return joined


_DESCENT = Checks(objective=one_of(Aim), per=one_of(Per), steps=at_least(1), learning_rate=above(0))


@dataclass(frozen=True)
class AdaMerging(CoefficientSearch):
    """AdaMerging: Adam on the coefficients, down the mean over tasks of the entropy of the model's predictions.

    Each step takes the next batch of every task, in turn, and clamps every coefficient into [0, `largest`]. It returns
    the last coefficients: the easiest batches would have the lowest entropy on the way.

    Args:
        per: A coefficient for each `expert` (task-wise), for each of its weights (layer-wise, the paper's better one),
            or for each row of these.
        objective: `entropy` needs no labels, but a confident wrong answer lowers it too. `loss` is the loss of the
            targets, `distill` the divergence from the prediction of the task's own expert.
        steps: Number of steps.
        learning_rate: Adam's rate; a coefficient moves by about this much in a step.
        start: Every coefficient at the start.
        largest: The largest coefficient.
    """

    checks = _DESCENT

    per: Per = "weight"
    objective: Aim = "entropy"
    steps: int = 500
    learning_rate: float = 1e-3
    start: float = 0.3
    largest: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.start <= self.largest < math.inf:
            raise ValueError(f"AdaMerging: start must be from 0 to a finite largest={self.largest}, got {self.start}")

    def search(self, combination: Combination, objective: Objective, progress: Progress = iter) -> Found:
        first = [self.start for _ in range(combination.experts)]
        return _descended(self, combination, objective, first, progress, bounds=(0.0, self.largest))


@dataclass(frozen=True)
class ATLAS(CoefficientSearch):
    """aTLAS: Adam on the coefficients, which may be negative, down the mean over tasks of the loss of the targets.

    With merges among the experts, such as RegMean and SparseAverage, it starts at the mean of the merges and corrects
    it with every expert (`docs/results/merging.md`). The validation rows need labels; many steps overfit them.

    Args:
        steps: Number of steps.
        learning_rate: Adam's rate; a coefficient moves by about this much in a step.
        start: Coefficients of the first merges and experts at the start, in order; the others start at 0. Default: the
            mean of the merges, or without merges all 0, as in the paper.
        objective: `loss` of the targets, or `distill`, the divergence from the prediction of the task's own expert in
            their place, or `entropy`.
        per: A coefficient for each `expert`, for each of its weights, or for each row of these: hundreds of times as
            many, which keep more of many experts and learn a few rows by heart.
        decay: Whether the rate falls linearly to 0.
    """

    checks = _DESCENT | Checks(start=finite)

    steps: int = 60
    learning_rate: float = 1e-2
    start: list[float] | None = None
    objective: Aim = "loss"
    per: Per = "weight"
    decay: bool = False

    def check(self, experts: int) -> None:
        if len(self.start or []) > experts:
            there = f"{experts} experts, merges among them"
            raise ValueError(f"ATLAS: start has {len(self.start or [])} coefficients for {there}; give no more")

    def search(self, combination: Combination, objective: Objective, progress: Progress = iter) -> Found:
        self.check(combination.experts)
        first = self.start
        if first is None:
            first = [1 / combination.merges for _ in range(combination.merges)]
        return _descended(self, combination, objective, first, progress, decay=self.decay)


def _descended(
    algorithm: AdaMerging | ATLAS,
    combination: Combination,
    objective: Objective,
    first: Sequence[float],
    progress: Progress,
    bounds: tuple[float, float] | None = None,
    decay: bool = False,
) -> Found:
    start = first_coefficients(combination, algorithm.per, first)
    measured = MEASURES[algorithm.objective]
    rate = algorithm.learning_rate
    coefficients, trials = descend(
        combination, objective, measured, start, rate, algorithm.steps, progress, bounds, decay
    )
    return Found(coefficients, objective.losses(), trials)
