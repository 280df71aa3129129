"""Measure models on tasks: losses, generated answers and choices, as scores by task. Start with `compare.py`."""

from modular_experts.evaluation.compare import evaluate
from modular_experts.evaluation.generation import answer_text, answered, generate_texts, generate_tokens
from modular_experts.evaluation.likelihood import (
    answer_logits,
    batch_losses,
    check_packing,
    choice_log_likelihoods,
    greedy_matches,
    row_sums,
)
from modular_experts.evaluation.measure import measure, score_batch
from modular_experts.evaluation.metrics import TEXT_METRICS, stemmed_rouge_l, text_metrics
from modular_experts.evaluation.scores import TaskScores

__all__ = ["TEXT_METRICS", "TaskScores", "answer_logits", "answer_text", "answered", "batch_losses", "check_packing"]
__all__ += ["choice_log_likelihoods", "evaluate", "generate_texts", "generate_tokens", "greedy_matches", "measure"]
__all__ += ["row_sums", "score_batch", "stemmed_rouge_l", "text_metrics"]
