"""Two processes train what one trains, on a score of random settings; `soak` draws more, through the command."""

import random
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_rows
from testbed.forked import run_on_two_ranks

from modular_experts import FullExpert, LoRAExpert, MaskSchedule, SparseExpert, fit, open_expert
from modular_experts.masks import RandomScore, SelectOnce
from modular_experts.training.fit import end_processes

pytestmark = pytest.mark.ddp
CASES = range(20)
SILENT = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}


def random_settings(case: int) -> tuple[Any, list[str], dict[str, Any]]:
    """Return an expert type, the modules that get it, and the settings of a fit."""
    draw = random.Random(case)
    unit = draw.choice(["element", "row", "column", "block"])
    sparse = partial(SparseExpert, keep_ratio=draw.choice([0.05, 0.3]), granularity=unit, block_size=4)
    expert = draw.choice([sparse, sparse, partial(LoRAExpert, rank=2, alpha=4.0), FullExpert])
    modules = draw.sample(["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"], 2)
    trainer = {
        "accumulate_grad_batches": draw.choice([1, 1, 2]),
        "gradient_clip_val": draw.choice([None, 0.5]),
        # A choice by gradients could turn at a rounding.
        "callbacks": [MaskSchedule(score=RandomScore(), rule=SelectOnce())],
    }
    settings = {
        "steps": draw.randint(2, 4),
        "seed": draw.randrange(50),
        "batch_size": draw.choice([2, 4, 6, 8]),
        "data": {"packing": draw.choice([None, True, False])},
        "model": {"gradient_checkpointing": draw.choice([True, False])},
        "trainer": trainer,
    }
    return expert, modules, settings


def train_all(folder: Path, base: Path, rows: Path, processes: int) -> None:
    """Train the expert of every case in this process, or as one of two."""
    warnings.simplefilter("ignore")
    several = {"accelerator": "cpu", "devices": processes, "strategy": "ddp" if processes > 1 else "auto"}
    for case in CASES:
        expert, modules, settings = random_settings(case)
        settings["trainer"] |= SILENT | several | {"default_root_dir": str(folder)}
        fit(base, rows, expert, modules, folder / str(case), **settings)
    end_processes()


def test_two_processes_train_what_one_trains(one_block, tmp_path) -> None:
    draw = random.Random(0)
    rows = [
        {"input": "".join(draw.choice("abcdef ") for _ in range(draw.randint(1, 20))), "target": str(number % 3)}
        for number in range(13)
    ]
    file = write_rows(tmp_path / "rows.jsonl", [row | {"split": "train"} for row in rows])
    with warnings.catch_warnings():
        train_all(tmp_path / "one", one_block, file, 1)
    run_on_two_ranks(train_all, tmp_path / "two", one_block, file, 2)
    for case in CASES:
        alone = open_expert(tmp_path / "one" / str(case))
        together = open_expert(tmp_path / "two" / str(case))
        assert set(together) == set(alone)
        for name, delta in together.items():
            difference = (delta.dense() - alone[name].dense()).norm()
            # A full expert is a difference of two rounded weights.
            rounding = 3e-7 * delta.dense().numel() ** 0.5
            assert difference <= 0.02 * alone[name].dense().norm() + rounding, f"case {case}, {name}"
            assert torch.equal(delta.support(), alone[name].support()), f"case {case}, {name}"
