"""The base's training: what it goes on from, and how fast it learns when."""

from __future__ import annotations

import os

import pytest
import torch

from modular_experts.quickstart.base import BaseTraining, _newest
from modular_experts.quickstart.plan import Plan


def test_half_a_checkpoint_is_passed_over_for_the_whole_one_before_it(tmp_path) -> None:
    for age, name in enumerate(("first", "second", "cut")):
        torch.save({"weight": torch.ones(1000)}, tmp_path / f"{name}.ckpt")
        os.utime(tmp_path / f"{name}.ckpt", (age, age))
    assert _newest(tmp_path) == tmp_path / "cut.ckpt"
    whole = (tmp_path / "cut.ckpt").read_bytes()
    for size in (0, 100, len(whole) // 2):
        (tmp_path / "cut.ckpt").write_bytes(whole[:size])
        os.utime(tmp_path / "cut.ckpt", (9, 9))
        assert _newest(tmp_path) == tmp_path / "second.ckpt"
    assert _newest(tmp_path / "none") is None


def test_the_rate_warms_up_stays_and_falls_to_zero_once_the_target_is_met() -> None:
    training = BaseTraining(torch.nn.Linear(1, 1), Plan(base_decay=100), lambda done: None)
    assert [training._rate(step) for step in (0, 24, 49, 2000)] == [0.02, 0.5, 1.0, 1.0]
    training.reached = 700
    assert [training._rate(step) for step in (700, 750, 800, 801)] == pytest.approx([1.0, 0.5, 0.0, 0.0])
