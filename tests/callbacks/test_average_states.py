"""AverageStates: which states are averaged, who sees the mean, and that training goes on from its own values."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from testbed import runs

from modular_experts.callbacks import AverageStates, ExportExpert, MaskSchedule
from modular_experts.experts import FullExpert, LoRAExpert, SparseExpert
from modular_experts.injection import expert_layers
from modular_experts.library import open_expert
from modular_experts.masks import GrowAndDrop, SelectOnce

SPARSE = partial(SparseExpert, keep_ratio=0.1)
BLOCK = partial(SparseExpert, keep_ratio=0.3, granularity="block", block_size=8)
ONCE = partial(MaskSchedule, rule=SelectOnce(), batches=1)


class Deltas(Callback):
    """Keeps the dense deltas after each step, in float64."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if len(self.steps) < trainer.global_step:
            self.steps.append({name: delta.dense().double().clone() for name, delta in pl_module.task_vector()})


def _mean(states: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: sum(state[name] for state in states) / len(states) for name in states[0]}


def _equal(vector, expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.allclose(vector[name].dense().double(), dense, atol=1e-6) for name, dense in expected.items())


@pytest.mark.parametrize("expert", [SPARSE, BLOCK, FullExpert], ids=["entries", "tiles", "full"])
def test_the_mean_of_the_last_states_is_exported(expert, tiny_llama_dir, task_files, tmp_path) -> None:
    states, export = Deltas(), ExportExpert(str(tmp_path / "library"), "mine", monitor=None)
    average = AverageStates(share=0.5)
    # With the export first as well as last, the same is exported; a mean of 6 steps' last half holds 3 states.
    module, _, _ = runs.fit(tiny_llama_dir, task_files, tmp_path, expert, export, average, ONCE(), states)
    stored, expected = open_expert(export.target), _mean(states.steps[3:])
    assert average.averaged == 3
    assert _equal(stored, expected)
    assert not _equal(stored, states.steps[-1])
    assert _equal(dict(module.task_vector()), expected)
    assert stored.record["hyperparameters"]["averaged"] == 0.5


def test_the_mean_of_a_lora_is_that_of_its_factors(tiny_llama_dir, task_files, tmp_path) -> None:
    factors = []

    class Factors(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            layers = expert_layers(pl_module.model)
            factors.append({n: (la.expert.up.double(), la.expert.down.double()) for n, la in layers})

    module, _, _ = runs.fit(
        tiny_llama_dir, task_files, tmp_path, partial(LoRAExpert, rank=2), AverageStates(share=1.0), Factors()
    )
    for name, layer in expert_layers(module.model):
        for mine, which in ((layer.expert.up, 0), (layer.expert.down, 1)):
            assert torch.allclose(mine.double(), sum(state[name][which] for state in factors) / 6, atol=1e-6)


def test_training_itself_does_not_change_and_validations_see_the_mean(tiny_llama_dir, task_files, tmp_path) -> None:
    seen = {}

    class Seen(Callback):
        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
            seen[trainer.global_step] = {name: delta * 1.0 for name, delta in pl_module.task_vector()}

    states = Deltas()
    runs.fit(tiny_llama_dir, task_files, tmp_path, SPARSE, ONCE(), states, val_check_interval=2)
    averaged = Deltas()
    runs.fit(
        *(tiny_llama_dir, task_files, tmp_path, SPARSE, AverageStates(0.5), ONCE(), averaged, Seen()),
        val_check_interval=2,
    )
    assert all(torch.equal(a[n], b[n]) for a, b in zip(states.steps, averaged.steps, strict=True) for n in a)
    assert _equal(seen[2], states.steps[1])
    assert _equal(seen[4], states.steps[3])
    assert _equal(seen[6], _mean(states.steps[3:]))


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_the_best_validated_mean_is_exported_wherever_the_callback_stands(
    first, tiny_llama_dir, task_files, tmp_path
) -> None:
    export, average, states = ExportExpert(str(tmp_path / "library"), "mine"), AverageStates(1.0), Deltas()
    callbacks = [average, export] if first else [export, average]
    rates = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: -1.0 if step > 3 else 1.0)
    module = runs.module(tiny_llama_dir, SPARSE, optimizer=partial(torch.optim.SGD, lr=1.0), scheduler=rates)
    trainer = runs.trainer(tmp_path, *callbacks, ONCE(), states, max_steps=10, val_check_interval=2)
    trainer.fit(module, runs.mixture(task_files, tiny_llama_dir))
    assert 0 < export.best_step < 10
    assert _equal(open_expert(export.target), _mean(states.steps[: export.best_step]))


def test_a_choice_of_other_entries_starts_the_mean_anew(tiny_llama_dir, task_files, tmp_path) -> None:
    states, average = Deltas(), AverageStates(share=1.0)
    schedule = MaskSchedule(rule=GrowAndDrop(every=2, until=0.6, replace=0.4), batches=1)
    module, _, _ = runs.fit(tiny_llama_dir, task_files, tmp_path, SPARSE, schedule, average, states, max_steps=9)
    # The support changes before the third and the fifth step, and is frozen from the sixth on.
    assert average.averaged == 5
    assert _equal(dict(module.task_vector()), _mean(states.steps[4:]))


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_resumed_run_ends_with_the_same_mean(tiny_llama_dir, task_files, tmp_path) -> None:
    """The checkpoint is written after a validation of the mean, and holds the values of training beside it."""

    def run():
        optimizer = partial(torch.optim.AdamW, lr=1e-2)
        module, average = runs.module(tiny_llama_dir, SPARSE, optimizer=optimizer), AverageStates(share=0.8)
        saving = ModelCheckpoint(tmp_path / "saved", filename="{step}", save_top_k=-1)
        settings = {"max_steps": 8, "val_check_interval": 4, "enable_checkpointing": True}
        trainer = runs.trainer(tmp_path, average, ONCE(seed=0), saving, **settings)
        return module, average, trainer

    torch.manual_seed(0)
    whole, average, trainer = run()
    trainer.fit(whole, runs.mixture(task_files, tiny_llama_dir, seed=0))
    rest, again, trainer = run()
    trainer.fit(rest, runs.mixture(task_files, tiny_llama_dir, seed=0), ckpt_path=tmp_path / "saved" / "step=4.ckpt")
    assert again.averaged == average.averaged == 7
    expected = dict(whole.task_vector())
    assert all(torch.equal(delta.dense(), expected[name].dense()) for name, delta in rest.task_vector())
