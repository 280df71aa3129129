"""The base's learning rate warms up, and falls once the target is met."""

import pytest
import torch

from modular_experts.quickstart.plan import Plan
from modular_experts.quickstart.run import BaseTraining


def test_the_rate_warms_up_stays_and_falls_to_zero_once_the_target_is_met() -> None:
    training = BaseTraining(torch.nn.Linear(1, 1), Plan(base_decay=100), lambda done: None)
    assert [training._rate(step) for step in (0, 24, 49, 2000)] == [0.02, 0.5, 1.0, 1.0]
    training.reached = 700
    assert [training._rate(step) for step in (700, 750, 800, 801)] == pytest.approx([1.0, 0.5, 0.0, 0.0])
