"""LiNeS scales what any method merges, by the depth that the merger finds in the weights' names."""

from __future__ import annotations

import pytest
import torch
from testbed.random_deltas import random_delta

from modular_experts.library import make_record, open_expert, write_expert
from modular_experts.merger.merged import Merged
from modular_experts.methods import EMR, TIES, Average, LiNeS
from modular_experts.methods.method import Context

WEIGHTS = {
    "model.embed_tokens.weight": 1.0,
    "model.layers.0.mlp.up_proj.weight": 1.0,
    "model.layers.2.mlp.up_proj.weight": 1.0 + 0.5 * 2 / 4,
    "model.layers.4.mlp.up_proj.weight": 1.5,
    "model.norm.weight": 1.0,
}


@pytest.fixture
def experts(tmp_path):
    record = make_record("X", {"id": "none", "fingerprint": "0" * 64})
    for expert in range(2):
        # Only one of the experts moves the last block.
        names = [name for name in WEIGHTS if expert or "layers.4" not in name]
        deltas = [(name, random_delta("Dense", (6, 8), 10 * expert + place)) for place, name in enumerate(names)]
        write_expert(tmp_path / f"e{expert}", deltas, record)
    return [open_expert(tmp_path / f"e{expert}") for expert in range(2)]


@pytest.mark.parametrize("inner", [Average(), TIES(scope="global", keep=0.4)], ids=str)
def test_each_block_gets_its_scale_linearly_between_first_and_last(experts, inner):
    plain, scaled = Merged(experts, inner), Merged(experts, LiNeS(inner, scale=0.4, last=1.5))
    for name, factor in WEIGHTS.items():
        torch.testing.assert_close(scaled[name].dense(), 0.4 * factor * plain[name].dense())


def test_the_last_block_is_the_last_that_is_merged(experts):
    without = {r"model\.layers\.4\..*": None}
    plain, scaled = Merged(experts, "Average", without), Merged(experts, LiNeS(Average(), last=3.0), without)
    for block, factor in ((0, 1.0), (2, 3.0)):
        name = f"model.layers.{block}.mlp.up_proj.weight"
        torch.testing.assert_close(scaled[name].dense(), factor * plain[name].dense())


def test_a_single_block_gets_the_scale_of_the_first(experts):
    names = {r"model\.layers\.0\..*": LiNeS(Average(), last=3.0)}
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(Merged(experts, None, names)[name].dense(), Merged(experts, "Average")[name].dense())


def test_experts_of_tasks_are_scaled_too():
    deltas = [random_delta("Dense", (4, 5), seed) for seed in range(2)]
    prepared = EMR().prepare([deltas])
    method = LiNeS(EMR(), scale=2.0, last=1.5)
    assert method.has_tasks
    found = method.per_task(deltas, 1, Context(prepared=prepared, depth=1.0)).dense()
    torch.testing.assert_close(found, 3.0 * EMR().per_task(deltas, 1, Context(prepared=prepared)).dense())
