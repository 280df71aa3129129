"""On SmolLM2 and two real tasks, a short fit of each expert of a related system learns, beside a LoRA.

Slow. The sizes are those of the configs, at all linear layers, and the learning rates those of the types.
"""

from __future__ import annotations

from functools import partial

import pytest
from lightning.pytorch import Callback, seed_everything
from testbed import runs
from testbed.real_tasks import SMOLLM2, mixture, validation_loss

from modular_experts.callbacks import Boosting, RandomPaths
from modular_experts.experts import (
    AdaMixExpert,
    BoostedLoRAExpert,
    GLoRAExpert,
    LoRAExpert,
    TemplateBanks,
    TTLoRAExpert,
)
from modular_experts.training.module import ExpertModule

pytestmark = pytest.mark.slow

SYSTEMS = {
    "LoRA": (LoRAExpert, []),
    "TT-LoRA": (TTLoRAExpert, []),
    "AdaMix": (AdaMixExpert, []),
    "XGBLoRA": (BoostedLoRAExpert, [partial(Boosting, every=2)]),
    "ReLoRA": (partial(BoostedLoRAExpert, rank=4, alpha=8.0), [partial(Boosting, every=3, share=1.0)]),
    "GLoRA": (GLoRAExpert, []),
    "GLoRA, random paths": (GLoRAExpert, [RandomPaths]),
    "RECAST": (TemplateBanks(), []),
}
"""Each type or plan, and its callbacks; rounds are shorter than in the configs, so that there are some."""


@pytest.mark.xdist_group("mixtures")
def test_a_short_fit_of_each_expert_learns_two_tasks(tmp_path) -> None:
    losses, counts = {}, {}
    for name, (experts, callbacks) in SYSTEMS.items():
        seed_everything(0, verbose=False)
        plan = experts if isinstance(experts, TemplateBanks) else {"all-linear": experts}
        module = ExpertModule(str(SMOLLM2), experts=plan, dtype="float32")
        made: list[Callback] = [callback() for callback in callbacks]
        runs.trainer(tmp_path, *made, max_steps=6, limit_val_batches=0).fit(module, mixture())
        losses[name] = validation_loss(module)
        counts[name] = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        print(f"{name}: {counts[name]:,} trained numbers, validation loss {losses[name]:.3f}")
    module = ExpertModule(str(SMOLLM2), dtype="float32")
    module.configure_model()
    before = validation_loss(module)
    print(f"the base: validation loss {before:.3f}")
    for name, loss in losses.items():
        # XGBLoRA learns least in six steps: three rounds, each in a third of the blocks.
        assert loss < 0.98 * before, name
    assert counts["TT-LoRA"] < counts["LoRA"] / 10
    assert counts["RECAST"] == 420
