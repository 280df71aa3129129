"""The bar of training says which step of how many, and how long all of it will still take."""

from __future__ import annotations

import re
from functools import partial

import pytest
from testbed import runs

from modular_experts.cli.training import TrainingBar
from modular_experts.experts import SparseExpert


@pytest.mark.filterwarnings("ignore")  # what Lightning says when a bar is asked for in a log
def test_steps_and_time_are_those_of_the_whole_fit(tiny_llama_dir, task_files, tmp_path) -> None:
    seen = []

    class Watched(TrainingBar):
        def get_metrics(self, trainer, pl_module):
            seen.append(super().get_metrics(trainer, pl_module))
            return seen[-1]

    bar = Watched()
    sparse = partial(SparseExpert, keep_ratio=0.1)
    runs.fit(tiny_llama_dir, task_files, tmp_path, sparse, bar, max_steps=9, enable_progress_bar=True)
    steps = [metrics["step"] for metrics in seen if "step" in metrics]
    assert steps[-1] == "9/9"
    assert {"1/9", "6/9"} <= set(steps)
    assert all(re.fullmatch(r"\d+:\d\d:\d\d", metrics["left"]) for metrics in seen if "left" in metrics)
    assert "loss" in seen[-1]
    assert bar._get_train_description(2) == "Epoch 3"
