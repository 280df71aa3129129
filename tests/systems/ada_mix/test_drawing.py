"""ExpertModule lets experts draw in each step, takes a second pass for consistency, and resumes both exactly."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from testbed import runs

from modular_experts.injection import expert_layers
from modular_experts.systems.ada_mix import AdaMixExpert


class Draws(Callback):
    """Keeps the draws of each step, and what is logged."""

    def __init__(self) -> None:
        self.drawn: list[dict] = []
        self.logged: list[dict] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.drawn.append(
            {name: list(map(tuple, layer.expert.drawn.tolist())) for name, layer in expert_layers(pl_module.model)}
        )
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fit(base: Path, files: dict, folder: Path, expert, *callbacks: Callback, ckpt: Path | None = None, **settings):
    seed_everything(0, verbose=False)
    losses, optimizer = runs.Losses(), partial(torch.optim.AdamW, lr=0.01)
    module = runs.module(base, expert, dtype="float64", optimizer=optimizer)
    run = runs.trainer(folder, losses, *callbacks, **({"max_steps": 6} | settings))
    run.fit(module, runs.mixture(files, base), ckpt_path=ckpt)
    return module, losses.steps


def test_each_step_and_layer_draws_anew_and_micro_batches_share_a_draw(tiny_llama_dir, task_files, tmp_path) -> None:
    draws = Draws()
    expert = partial(AdaMixExpert, copies=4, consistency=2.0)
    _, losses = fit(tiny_llama_dir, task_files, tmp_path, expert, draws, accumulate_grad_batches=2, max_steps=4)
    assert len(losses) == 8
    assert draws.drawn[::2] == draws.drawn[1::2]
    assert len({tuple(pairs) for drawn in draws.drawn for pairs in drawn.values()}) > 8
    assert all(len(set(map(tuple, drawn.values()))) > 1 for drawn in draws.drawn)
    assert all(len(pairs) == 2 for drawn in draws.drawn for pairs in drawn.values())
    assert draws.logged[-1]["penalty/consistency"] > 0


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_run_with_draws_resumes_exactly(tiny_llama_dir, task_files, tmp_path) -> None:
    def run(name: str, ckpt: Path | None = None):
        saving = ModelCheckpoint(tmp_path / name, every_n_train_steps=2, save_top_k=-1, filename="{step}")
        expert = partial(AdaMixExpert, copies=3, dropout=0.1)
        return fit(*(tiny_llama_dir, task_files, tmp_path, expert, saving), ckpt=ckpt, enable_checkpointing=True)

    whole, losses = run("whole")
    again, rest = run("again", tmp_path / "whole" / "step=2.ckpt")
    assert rest == losses[2:]
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in whole.state_dict().items())
