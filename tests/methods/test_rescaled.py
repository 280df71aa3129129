"""Rescaled and LiNeS change the length of any merge: to the experts' own, or by depth."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from testbed.merging import tasks_of
from testbed.random_deltas import deltas_of_one_weight, random_delta

import modular_experts.methods as m
from modular_experts.deltas import Dense, LowRank, Sparse
from modular_experts.library import make_record, open_expert, write_expert
from modular_experts.merger.merged import Merged
from modular_experts.methods.method import Context


@pytest.mark.parametrize("inner", [m.TaskArithmetic(), m.TSVMerge(), m.SelfRegMean()], ids=str)
@given(deltas_of_one_weight(), st.sampled_from([-0.5, 1.0, 2.0]))
def test_the_norm_is_that_of_the_sum_over_the_root_and_the_direction_that_of_the_method(inner, deltas, scale):
    dense = [delta.dense().double() for delta in deltas]
    movers = sum(bool(matrix.any()) for matrix in dense)
    merged, plain = m.Rescaled(inner, scale).merge(deltas).dense().double(), inner.merge(deltas).dense().double()
    if plain.any():
        wanted = scale * sum(dense).norm() / movers**0.5 * plain / plain.norm()
        torch.testing.assert_close(merged, wanted, rtol=1e-6, atol=1e-8)
    else:
        assert not merged.any()


def test_a_low_rank_merge_is_measured_by_its_factors(monkeypatch):
    loras = [random_delta("LowRank", (12, 14), seed) for seed in range(3)]
    monkeypatch.setattr(LowRank, "dense", None)
    merged = m.Rescaled(m.TSVMerge()).merge([*loras, Sparse.zero((12, 14))])
    monkeypatch.undo()
    assert isinstance(merged, LowRank)
    assert merged.norm() == pytest.approx(sum(lora.dense() for lora in loras).norm().item() / 3**0.5)


def test_experts_of_tasks_are_those_of_the_inner_method():
    stream = [[Dense(torch.randn(4, 5, dtype=torch.float64)) for _ in range(2)]]
    for found, inner in zip(tasks_of(m.Rescaled(m.EMR(), scale=2.0), stream), tasks_of(m.EMR(), stream), strict=True):
        torch.testing.assert_close(found[0].dense(), 2.0 * inner[0].dense())
    assert not m.Rescaled(m.SparseAverage()).has_tasks


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


@pytest.mark.parametrize("inner", [m.Average(), m.TIES(scope="global", keep=0.4)], ids=str)
def test_each_block_gets_its_scale_linearly_between_first_and_last(experts, inner):
    plain, scaled = Merged(experts, inner), Merged(experts, m.LiNeS(inner, scale=0.4, last=1.5))
    for name, factor in WEIGHTS.items():
        torch.testing.assert_close(scaled[name].dense(), 0.4 * factor * plain[name].dense())


def test_the_last_block_is_the_last_that_is_merged(experts):
    without = {r"model\.layers\.4\..*": None}
    plain, scaled = Merged(experts, "Average", without), Merged(experts, m.LiNeS(m.Average(), last=3.0), without)
    for block, factor in ((0, 1.0), (2, 3.0)):
        name = f"model.layers.{block}.mlp.up_proj.weight"
        torch.testing.assert_close(scaled[name].dense(), factor * plain[name].dense())


def test_a_single_block_gets_the_scale_of_the_first(experts):
    names = {r"model\.layers\.0\..*": m.LiNeS(m.Average(), last=3.0)}
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(Merged(experts, None, names)[name].dense(), Merged(experts, "Average")[name].dense())


def test_experts_of_tasks_are_scaled_too():
    deltas = [random_delta("Dense", (4, 5), seed) for seed in range(2)]
    prepared = m.EMR().prepare([deltas])
    method = m.LiNeS(m.EMR(), scale=2.0, last=1.5)
    assert method.has_tasks
    found = method.per_task(deltas, 1, Context(prepared=prepared, depth=1.0)).dense()
    torch.testing.assert_close(found, 3.0 * m.EMR().per_task(deltas, 1, Context(prepared=prepared)).dense())
