"""On SmolLM2 and two real tasks, a short fit of each expert of a related system learns, beside a LoRA.

Slow. The sizes and the learning rates come from the configs, at all linear layers.
"""

from __future__ import annotations

from functools import partial

import pytest
from testbed.real_tasks import fit_six_steps, loss_of_base, validation_loss

from modular_experts.callbacks import Boosting, RandomPaths
from modular_experts.experts import (
    BoostedLoRAExpert,
    GLoRAExpert,
    LoRAExpert,
    TemplateBanks,
)
from modular_experts.systems.ada_mix import AdaMixExpert
from modular_experts.systems.tt_lora import TTLoRAExpert

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

RATES = {"ReLoRA": 0.009}
"""Learning rates that the configs give in place of the type's own."""


@pytest.mark.xdist_group("mixtures")
def test_a_short_fit_of_each_expert_learns_two_tasks(tmp_path) -> None:
    losses, counts = {}, {}
    for name, (experts, callbacks) in SYSTEMS.items():
        plan = experts if isinstance(experts, TemplateBanks) else {"all-linear": experts}
        own = {"learning_rate": RATES[name]} if name in RATES else {}
        module = fit_six_steps(tmp_path, plan, *(callback() for callback in callbacks), **own)
        losses[name] = validation_loss(module)
        counts[name] = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        print(f"{name}: {counts[name]:,} trained numbers, validation loss {losses[name]:.3f}")
    before = loss_of_base()
    for name, loss in losses.items():
        # XGBLoRA learns least in six steps: three rounds, each in a third of the blocks.
        assert loss < 0.98 * before, name
    assert counts["TT-LoRA"] < counts["LoRA"] / 10
    assert counts["RECAST"] == 420
