"""EvenValidation: the same validations whatever the epochs, one at the end, and a trainer's own settings before it."""

from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from testbed import runs

from modular_experts.experts import LoRAExpert
from modular_experts.training.even_validation import EvenValidation
from modular_experts.training.log_progress import LogProgress

LORA = partial(LoRAExpert, rank=2)


class Validated(Callback):
    """Keeps the step, the loss and the number of batches of every validation."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.losses: list[float] = []
        self.before: float | None = None

    def on_validation_end(self, trainer, pl_module) -> None:
        if trainer.sanity_checking:
            self.before = float(trainer.callback_metrics["val_loss"])
        else:
            self.steps.append(trainer.global_step)
            self.losses.append(float(trainer.callback_metrics["val_loss"]))


def _one_task(files: dict[str, Path]) -> dict[str, Path]:
    """Twelve rows to train on, so an epoch of batches of two rows is six steps, and six rows for validation."""
    return {"upper": files["upper"]}


def _fit(base: Path, files: dict[str, Path], folder: Path, *callbacks: Callback, **settings: Any) -> Validated:
    seen, data = Validated(), {"batch_size": 2, "eval_batch_size": 2}
    runs.fit(base, _one_task(files), folder, LORA, seen, *callbacks, data=data, **settings)
    return seen


CASES = {
    "many epochs": ({"max_steps": -1, "max_epochs": 5}, [3, 6, 9, 12, 15, 18, 21, 24, 27, 30]),
    "does not divide": ({"max_steps": 33}, [4, 7, 10, 14, 17, 20, 24, 27, 30, 33]),
    "short": ({"max_steps": 3}, [3]),
    "accumulation": (
        {"max_steps": -1, "max_epochs": 6, "accumulate_grad_batches": 4},  # two steps an epoch
        [2, 3, 4, 5, 6, 8, 9, 10, 11, 12],
    ),
    "a limit": ({"max_steps": 20, "limit_val_batches": 0}, []),
    "an interval of the user's": ({"max_steps": 12, "val_check_interval": 5}, [5, 11]),
}


@pytest.mark.parametrize("case", CASES)
def test_validations_fall_on_even_steps_and_on_the_last(case, one_block, task_files, tmp_path) -> None:
    settings, wanted = CASES[case]
    assert _fit(one_block, task_files, tmp_path, **settings).steps == wanted


def test_the_first_loss_is_that_of_the_base_on_the_same_rows(one_block, task_files, tmp_path) -> None:
    seen = _fit(one_block, task_files, tmp_path, max_steps=3, num_sanity_val_steps=-1)
    module = runs.module(one_block, None)
    runs.trainer(tmp_path).validate(module, runs.mixture(_one_task(task_files), one_block), verbose=False)
    assert seen.before == pytest.approx(module.results["held_in"]["loss"], rel=1e-6)
    assert seen.losses[-1] != seen.before


def test_training_is_the_same_with_and_without_validation(one_block, task_files, tmp_path) -> None:
    dropout = partial(LoRAExpert, rank=2, dropout=0.3)
    losses = [
        runs.fit(one_block, task_files, tmp_path, dropout, max_steps=12, limit_val_batches=limit)[2]
        for limit in (0, 1.0)
    ]
    assert losses[0] == losses[1]


def test_a_fit_that_time_ends_is_validated_on_the_way_and_at_its_end(one_block, task_files, tmp_path) -> None:
    seen = _fit(one_block, task_files, tmp_path, max_steps=10**6, max_time=timedelta(seconds=1))
    assert 3 <= len(seen.steps) <= 11
    assert seen.steps == sorted(set(seen.steps))


@pytest.mark.parametrize("interrupted", [False, True])
def test_it_validates_evenly_again_and_leaves_the_trainer_as_it_was(
    interrupted, one_block, task_files, tmp_path
) -> None:
    """Twelve rows are six steps; six rows for validation are three batches, of which Lightning checks two."""

    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_) -> None:
            if interrupted and trainer.global_step == 5:
                raise RuntimeError("stop")

    seen, progress, even = Validated(), LogProgress(), EvenValidation(times=3)
    data = partial(runs.mixture, _one_task(task_files), one_block, batch_size=2, eval_batch_size=2)
    trainer = runs.trainer(tmp_path, seen, progress, even, Stop())
    with pytest.raises(RuntimeError, match="stop") if interrupted else nullcontext():
        trainer.fit(runs.module(one_block, LORA), data())
    assert seen.steps == ([3] if interrupted else [3, 6])
    assert (trainer.val_check_interval, trainer.num_sanity_val_steps) == (1.0, 2)
    assert seen.before is not None
    assert progress.first_loss is None, "two of three batches tell nothing that compares"
    trainer.fit_loop.epoch_loop.max_steps, interrupted = 12, False
    trainer.fit(runs.module(one_block, LORA), data())
    assert seen.steps[-2:] == [8, 12]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_run_resumed_from_any_validation_goes_on_with_the_same_losses_and_validations(
    one_block, task_files, tmp_path
) -> None:
    """An epoch is six steps: one checkpoint is of its middle, one of its end."""

    def run(ckpt: Path | None = None) -> tuple[list[float], list[int], Any]:
        seen, kind = Validated(), partial(LoRAExpert, rank=2, dropout=0.3)
        saving = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{step}", enable_version_counter=False)
        how = {"max_steps": 18, "enable_checkpointing": True, "ckpt": ckpt}
        _, trainer, losses = runs.fit(one_block, task_files, tmp_path, kind, seen, saving, **how)
        return losses, seen.steps, trainer.fit_loop.epoch_loop._batches_that_stepped

    whole, validated, logged = run()
    assert validated == [3, 6, 9, 12, 15, 18]
    for step in (6, 9):
        after, rest, counted = run(tmp_path / f"step={step}.ckpt")
        assert after == whole[step:], step
        assert rest == [one for one in validated if one > step]
        assert counted == logged, "metrics would be logged at other steps"
