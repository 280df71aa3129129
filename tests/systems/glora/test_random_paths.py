"""RandomPaths: draws are of seed, step and layer, micro-batches share one, and none stays behind."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from testbed import runs

from modular_experts.injection import expert_layers
from modular_experts.systems.glora import GLoRAExpert
from modular_experts.systems.glora.callback import RandomPaths
from modular_experts.testing import check_callback


def test_the_callback_keeps_its_state_within_a_fit() -> None:
    check_callback(RandomPaths, GLoRAExpert)


class Paths(Callback):
    """Keeps the path of each layer in each micro-batch."""

    def __init__(self) -> None:
        self.drawn: list[dict] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.drawn.append({name: layer.expert.drawn for name, layer in expert_layers(pl_module.model)})


def fit(base: Path, files: dict, folder: Path, *callbacks: Callback, **settings):
    seed_everything(0, verbose=False)
    losses, optimizer = runs.Losses(), partial(torch.optim.AdamW, lr=0.01)
    expert = settings.pop("expert", partial(GLoRAExpert, rank=2))
    module = runs.module(base, expert, dtype="float64", optimizer=optimizer)
    run = runs.trainer(folder, *callbacks, losses, **({"max_steps": 6} | settings))
    run.fit(module, runs.mixture(files, base))
    return module, losses.steps


def test_a_path_is_drawn_for_each_step_and_layer_and_micro_batches_share_it(tiny_llama_dir, task_files, tmp_path):
    paths = Paths()
    place = (tiny_llama_dir, task_files, tmp_path)
    module, losses = fit(*place, RandomPaths(seed=1), paths, accumulate_grad_batches=2, max_steps=40)
    assert len(losses) == 80
    assert paths.drawn[::2] == paths.drawn[1::2]
    # Without biases 16 paths are left: 40 steps of four layers draw each about ten times.
    counted = Counter(path for drawn in paths.drawn[::2] for path in drawn.values())
    assert len(counted) == 16
    # Chi-square with 15 degrees of freedom; 37.7 is its 99.9 % quantile.
    assert sum((number - 10) ** 2 / 10 for number in counted.values()) < 37.7
    assert sum(len(set(drawn.values())) > 1 for drawn in paths.drawn) > 70
    assert all(layer.expert.drawn is None for _, layer in expert_layers(module.model)), "later training is the largest"
    again = Paths()
    fit(*place, RandomPaths(seed=1), again, max_steps=3)
    assert again.drawn == paths.drawn[:6:2]
    fit(*place, RandomPaths(seed=2), again, max_steps=3)
    assert again.drawn[3:] != again.drawn[:3]


def test_a_fit_that_fails_leaves_no_path_drawn(tiny_llama_dir, task_files, tmp_path) -> None:
    class Fail(Paths):
        def on_train_batch_end(self, trainer, pl_module, *rest) -> None:
            super().on_train_batch_end(trainer, pl_module, *rest)
            self.layers = dict(expert_layers(pl_module.model))
            raise OSError

    failing = Fail()
    with pytest.raises(OSError):  # noqa: PT011
        fit(tiny_llama_dir, task_files, tmp_path, RandomPaths(), failing)
    assert all(failing.drawn[0].values())
    assert all(layer.expert.drawn is None for layer in failing.layers.values())
