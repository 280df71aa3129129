"""Evaluation: what a model did on each task - losses, generations, scores, and their report."""

from __future__ import annotations

from modular_experts.evaluation.generation import generate
from modular_experts.evaluation.likelihood import choice_log_likelihoods, row_losses
from modular_experts.evaluation.results import results_summary, results_table, write_results
from modular_experts.evaluation.scores import TaskScores

__all__ = [
    "TaskScores",
    "choice_log_likelihoods",
    "generate",
    "results_summary",
    "results_table",
    "row_losses",
    "write_results",
]
