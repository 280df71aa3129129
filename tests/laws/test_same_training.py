"""Six random fits end the same in two processes, resumed, and with divided, packed or recomputed batches.

`soak` draws more kinds of experts, bases and settings.
"""

import random
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_rows
from lightning.pytorch.callbacks import ModelCheckpoint
from testbed.forked import run_on_two_ranks

from modular_experts import FullExpert, LoRAExpert, MaskSchedule, SparseExpert, fit, open_expert
from modular_experts.masks import RandomScore, SelectOnce
from modular_experts.training.fit import end_processes

CASES = (0, 1, 2, 4, 5, 7)
"""Seeds of four units of sparse experts, a LoRA and a full expert, clipped or not, in whole steps or in parts."""
SILENT = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
BATCH = 8


def random_fit(case: int) -> tuple[Any, list[str], dict[str, Any]]:
    """Return an expert type, the modules that get it, and the settings of a fit."""
    draw = random.Random(case)
    unit = draw.choice(["element", "row", "column", "block"])
    sparse = partial(SparseExpert, keep_ratio=draw.choice([0.05, 0.3]), granularity=unit, block_size=4)
    expert = draw.choice([sparse, sparse, partial(LoRAExpert, rank=2, alpha=4.0), FullExpert])
    modules = draw.sample(["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"], 2)
    trainer = {"gradient_clip_val": draw.choice([None, 0.5]), "accumulate_grad_batches": draw.choice([1, 2])}
    settings = {"steps": draw.randint(2, 5), "seed": draw.randrange(50), "trainer": trainer}
    return expert, modules, settings


def train(place: tuple[Path, Path], out: Path, case: int, *callbacks: Any, **changes: Any) -> None:
    """Train the expert of a case on the base and the rows of `place`, with changes of its settings."""
    base, rows = place
    expert, modules, settings = random_fit(case)
    # A choice by gradients could turn at a rounding.
    schedule = MaskSchedule(score=RandomScore(), rule=SelectOnce())
    own = changes.pop("trainer", {})
    trainer = SILENT | settings.pop("trainer") | {"default_root_dir": str(out.parent)} | own
    trainer["callbacks"] = [schedule, *callbacks]
    how = {"batch_size": BATCH, "data": {"packing": False}} | settings | changes
    fit(base, rows, expert, modules, out, trainer=trainer, overwrite=True, **how)


@pytest.fixture(scope="module")
def place(one_block, tmp_path_factory) -> tuple[Path, Path]:
    """A base, and a file of 16 rows, which batches of 8 divide."""
    draw = random.Random(0)
    rows = [
        {"input": "".join(draw.choice("abcdef ") for _ in range(draw.randint(1, 20))), "target": str(number % 3)}
        for number in range(16)
    ]
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    return one_block, write_rows(file, [row | {"split": "train"} for row in rows])


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory) -> Path:
    """The folder of the experts of all cases, trained in the plain way, and of checkpoints of their steps."""
    folder = tmp_path_factory.mktemp("whole")
    for case in CASES:
        saving = ModelCheckpoint(folder / f"checkpoints-{case}", "{step}", every_n_train_steps=1, save_top_k=-1)
        train(place, folder / str(case), case, saving, trainer={"enable_checkpointing": True})
    return folder


def check_alike(whole: Path, other: Path, case: int) -> None:
    """Check that two experts keep the same entries, and that their values differ by rounding alone."""
    first, second = open_expert(whole / str(case)), open_expert(other / str(case))
    assert set(second) == set(first)
    for name, delta in second.items():
        expected = first[name]
        difference = (delta.dense() - expected.dense()).norm()
        # A full expert is a difference of two rounded weights.
        rounding = 3e-7 * expected.shape.numel() ** 0.5
        assert difference <= 0.02 * expected.dense().norm() + rounding, f"case {case}, {name}"
        assert torch.equal(delta.support(), expected.support()), f"case {case}, {name}"


WAYS: dict[str, dict[str, Any]] = {
    "packed": {"data": {"packing": True}},
    "recomputed": {"model": {"gradient_checkpointing": True}},
}


@pytest.mark.parametrize("way", WAYS)
def test_packed_and_recomputed_batches_train_the_same(way, place, whole, tmp_path) -> None:
    for case in CASES:
        train(place, tmp_path / str(case), case, **WAYS[way])
        check_alike(whole, tmp_path, case)


def test_batches_in_parts_train_the_same(place, whole, tmp_path) -> None:
    for case in CASES:
        parts = 2 * random_fit(case)[2]["trainer"]["accumulate_grad_batches"]
        train(place, tmp_path / str(case), case, batch_size=BATCH // 2, trainer={"accumulate_grad_batches": parts})
        check_alike(whole, tmp_path, case)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_run_ends_with_the_same_bytes(place, whole, tmp_path) -> None:
    for case in CASES:
        stop = random.Random(-case).randint(1, random_fit(case)[2]["steps"] - 1)
        train(place, tmp_path / str(case), case, checkpoint=whole / f"checkpoints-{case}" / f"step={stop}.ckpt")
        resumed = open_expert(tmp_path / str(case))
        assert resumed.content_hash == open_expert(whole / str(case)).content_hash, f"case {case} from step {stop}"


def train_all_on_two(place: tuple[Path, Path], folder: Path) -> None:
    warnings.simplefilter("ignore")
    for case in CASES:
        train(place, folder / str(case), case, trainer={"accelerator": "cpu", "devices": 2, "strategy": "ddp"})
    end_processes()


@pytest.mark.ddp
def test_two_processes_train_what_one_trains(place, whole, tmp_path) -> None:
    run_on_two_ranks(train_all_on_two, place, tmp_path)
    for case in CASES:
        check_alike(whole, tmp_path, case)
