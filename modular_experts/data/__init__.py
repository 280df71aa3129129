"""Data: tasks read, checked, tokenised and mixed into batches. `batch.py` says what a batch is."""

from __future__ import annotations

from modular_experts.data.batch import Batch, is_filler, prompts
from modular_experts.data.mixture import TaskMixture
from modular_experts.data.sampler import Equal, Mixing, Proportional, Temperature
from modular_experts.data.sources import TaskSource
from modular_experts.data.tasks import Task

__all__ = [
    "Batch",
    "Equal",
    "Mixing",
    "Proportional",
    "Task",
    "TaskMixture",
    "TaskSource",
    "Temperature",
    "is_filler",
    "prompts",
]
