"""Evaluation: what a model did on each task - losses, generations, scores, and their report."""

from __future__ import annotations

from modular_experts.evaluation.generation import generate
from modular_experts.evaluation.likelihood import (
    answer_logits,
    batch_losses,
    choice_log_likelihoods,
    greedy_matches,
    row_losses,
)
from modular_experts.evaluation.measure import evaluate, measure, score_batch
from modular_experts.evaluation.scores import TaskScores

__all__ = [
    "TaskScores",
    "answer_logits",
    "batch_losses",
    "choice_log_likelihoods",
    "evaluate",
    "generate",
    "greedy_matches",
    "measure",
    "row_losses",
    "score_batch",
]
