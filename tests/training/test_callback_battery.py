"""Every built-in callback with a state of its own keeps it within a fit; `check_callback` finds those that do not."""

import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from testbed import runs

from modular_experts.experts import FullExpert, LoRAExpert, MaskedExpert, SparseExpert
from modular_experts.injection import expert_layers
from modular_experts.library import open_expert
from modular_experts.masks import GrowAndDrop, Reselect
from modular_experts.selection.mask_schedule import MaskSchedule
from modular_experts.selection.schedule import Schedule
from modular_experts.testing import check_callback
from modular_experts.training.even_validation import EvenValidation
from modular_experts.training.export_expert import ExportExpert
from modular_experts.training.gradient_mask import GradientMask
from modular_experts.training.log_progress import LogProgress
from modular_experts.training.train_under_others import TrainUnderOthers

DROPOUT = partial(LoRAExpert, rank=2, dropout=0.3)
CASES: dict[str, tuple[partial, Callable]] = {
    "mask": (partial(MaskSchedule), SparseExpert),
    "mask-passes": (partial(MaskSchedule, batches=2, rule=GrowAndDrop(every=3, until=0.9)), SparseExpert),
    "mask-masked": (partial(MaskSchedule, rule=Reselect(every=1)), MaskedExpert),
    "validation": (partial(EvenValidation, times=2), DROPOUT),
    # These read an expert of a library.
    "support": (partial(MaskSchedule, support="a"), SparseExpert),
    "others": (partial(TrainUnderOthers, others="a", count=1), SparseExpert),
    "gradient-mask": (partial(GradientMask, masks="a"), FullExpert),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory, one_block, task_files) -> Path:
    """A sparse expert of all linear layers."""
    folder = tmp_path_factory.mktemp("others")
    export = ExportExpert(str(folder / "library"), "a", monitor=None)
    runs.fit(one_block, task_files, folder, SparseExpert, export, own={"modules": "all-linear"}, max_steps=1)
    return folder / "library"


@pytest.mark.parametrize("name", CASES)
def test_a_callback_keeps_its_state_within_a_fit(name, library, one_block) -> None:
    """And its check draws no random numbers of the process."""
    kind, expert = CASES[name]
    read = {setting: str(library / "a") for setting, value in kind.keywords.items() if value == "a"}
    before = random.getstate(), torch.get_rng_state(), dict(os.environ)
    check_callback(partial(kind, **read), expert, base=one_block)
    assert before[0] == random.getstate()
    assert torch.equal(before[1], torch.get_rng_state())
    assert before[2] == dict(os.environ)


def test_an_export_and_the_log_of_progress_begin_anew(tmp_path) -> None:
    def exported(export: ExportExpert) -> list[Any]:
        return [export.best, export.best_step, open_expert(export.target).content_hash]

    check_callback(partial(ExportExpert, str(tmp_path), "mine", overwrite=True), DROPOUT, exported)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]

    def seen(progress: LogProgress) -> list[Any]:
        return [progress.rows, progress.first_loss, progress.last_loss]

    check_callback(LogProgress, DROPOUT, seen)


class ForgetsNothing(Schedule):
    """Lets four steps train, wherever they are."""

    def __init__(self) -> None:
        self.steps = 0

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.steps += 1
        for parameter in pl_module.parameters():
            parameter.grad = parameter.grad if self.steps <= 4 else None

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state_dict) -> None:
        self.steps = state_dict["steps"]


class RemembersNothing(ForgetsNothing):
    def setup(self, trainer, pl_module, stage) -> None:
        self.steps = 0

    def state_dict(self) -> dict[str, Any]:
        return {}


class StartsOver(Schedule):
    def before_optimizers(self, trainer, module) -> None:
        for _, layer in expert_layers(module.model):
            torch.nn.init.zeros_(layer.expert.up)


class DrawsByTheSeedOfItsMaking(Schedule):
    def __init__(self) -> None:
        self.is_odd = int(os.environ.get("PL_GLOBAL_SEED", 0)) % 2

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        for parameter in pl_module.parameters():
            if self.is_odd and parameter.grad is not None:
                parameter.grad.neg_()


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (DrawsByTheSeedOfItsMaking, "a callback must draw by the seed of its fit, not by the one when it was made; "),
        (ForgetsNothing, "a callback in two fits must act as two fresh ones; the losses are"),
        (RemembersNothing, "a run that a fresh callback resumes must end as if it had not been interrupted; "),
        (StartsOver, "a second fit must begin with all that the first one trained; at a rate of zero, "),
    ],
)
def test_a_state_that_outlives_its_fit_is_found(kind, sentence) -> None:
    with pytest.raises(AssertionError, match=sentence):
        check_callback(kind, DROPOUT)
