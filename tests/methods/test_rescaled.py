"""Rescaled, LiNeS and SVC change the length of any merge: to the experts' own, by depth, or in each direction.

The settings of a method inside another have dotted names, and its needs and record count.
"""

import pytest
import torch
from testbed.merging import assert_merged, merge_all, tasks_of
from testbed.random_deltas import random_delta

import modular_experts.methods as m
from modular_experts.deltas import Dense, LowRank, Sparse
from modular_experts.library import make_record, open_expert, write_expert
from modular_experts.merging.merged import Merged
from modular_experts.methods.method import Context, Needs
from modular_experts.methods.wrapper import setting_names, with_settings


@pytest.mark.parametrize("kind", [m.Rescaled, m.SVC])
def test_experts_of_tasks_are_those_of_the_inner_method(kind):
    stream = [[random_delta("Dense", shape, seed) for seed in range(2)] for shape in [(4, 5), (6, 3)]]
    for found, inner in zip(tasks_of(kind(m.EMR(), scale=2.0), stream), tasks_of(m.EMR(), stream), strict=True):
        for one, other in zip(found, inner, strict=True):
            assert_merged(one, 2.0 * other.dense())
    assert kind(m.EMR()).has_tasks
    assert not kind(m.SparseAverage()).has_tasks


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
        assert_merged(scaled[name], 0.4 * factor * plain[name].dense())


def test_the_last_block_is_the_last_that_is_merged(experts):
    without = {r"model\.layers\.4\..*": None}
    plain, scaled = Merged(experts, "Average", without), Merged(experts, m.LiNeS(m.Average(), last=3.0), without)
    for block, factor in ((0, 1.0), (2, 3.0)):
        name = f"model.layers.{block}.mlp.up_proj.weight"
        assert_merged(scaled[name], factor * plain[name].dense())
    # A single block gets the scale of the first.
    name, single = "model.layers.0.mlp.up_proj.weight", {r"model\.layers\.0\..*": m.LiNeS(m.Average(), last=3.0)}
    assert_merged(Merged(experts, None, single)[name], plain[name].dense())


def test_experts_of_tasks_are_scaled_too():
    deltas = [random_delta("Dense", (4, 5), seed) for seed in range(2)]
    prepared, method = m.EMR().prepare([deltas]), m.LiNeS(m.EMR(), scale=2.0, last=1.5)
    assert method.has_tasks
    found = method.per_task(deltas, 1, Context(prepared=prepared, depth=1.0))
    assert_merged(found, 3.0 * m.EMR().per_task(deltas, 1, Context(prepared=prepared)).dense())


def test_what_all_experts_do_is_counted_once_and_what_one_does_stays():
    both, own = torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64)
    both[0, 0], own[1, 1] = 2.0, 5.0
    assert_merged(m.SVC(m.TaskArithmetic()).merge([Dense(both), Dense(both), Dense(both + own)]), both + own)


def test_a_vector_is_a_single_row():
    deltas = [Dense(torch.tensor([2.0, 0.0])), Dense(torch.tensor([4.0, 3.0])), Sparse.zero((2,))]
    rows = [Dense(delta.dense()[None]) for delta in deltas]
    method = m.SVC(m.TaskArithmetic(), scale=0.5)
    assert torch.equal(method.merge(deltas).dense(), method.merge(rows).dense()[0])
    shares = [max(0.5, 12 / 4), max(0.5, (24 + 9) / 25)]
    torch.testing.assert_close(method.merge(deltas).dense(), torch.tensor([6.0, 3.0]) * 0.5 * 2 / sum(shares))


@pytest.mark.parametrize("kind", [m.SVC, m.Rescaled, m.LiNeS, m.KnOTS, m.CoreSpace, m.CtM])
def test_the_inner_method_looks_at_all_weights(kind):
    draw = torch.Generator().manual_seed(0)
    small = [LowRank(torch.randn(40, 4, generator=draw), torch.randn(4, 30, generator=draw)) for _ in range(3)]
    large = [delta * 1e6 for delta in small]
    first, second = merge_all(kind(m.TIES(scope="global", keep=0.3)), [small, large])
    # All that stays belongs to the larger weight, so it keeps the double share of its own entries. The entry at the
    # threshold, a float32, may fall.
    expected = kind(m.TIES(keep=0.6)).merge(large)
    assert first.norm() == 0
    assert (second - expected).norm() < 0.1 * expected.norm()


def test_settings_of_the_inner_method_have_dotted_names():
    method = m.SVC(m.KnOTS(m.TIES(keep=0.3)), alpha=0.25)
    assert {"alpha", "inner.scale", "inner.inner.keep"} < {*setting_names(method)}
    changed = with_settings(method, {"scale": 2.0, "inner.inner.keep": 0.1, "inner.scale": 3.0})
    assert changed == m.SVC(m.KnOTS(m.TIES(keep=0.1), scale=3.0), scale=2.0, alpha=0.25)
    another = with_settings(method, {"inner": m.SparseAverage(), "inner.exponent": 0.5})
    assert another.inner == m.SparseAverage(exponent=0.5)
    with pytest.raises(ValueError, match="keep"):
        with_settings(method, {"inner.inner.keep": 2.0})


def test_needs_are_those_of_both():
    inner, found = m.Fisher().needs, m.SVC(m.Fisher()).needs
    assert found.statistics == "fisher"
    assert found.matrices == m.SVC.own.matrices + inner.matrices
    assert m.SVC(m.DARE(rescale="l1")).needs.copies == m.DARE(rescale="l1").needs.copies > 0
    one = Needs(matrices=1, matrices_per_expert=2, squares=3, copies=4)
    assert one + one == Needs(matrices=2, matrices_per_expert=4, squares=6, copies=8)


def test_the_command_line_names_the_inner_method_and_its_settings(experts, run, tmp_path):
    how = ["--method", "SVC", "--method.inner", "TIES", "--method.inner.keep", "0.3", "--out", tmp_path / "both"]
    code, out, _ = run("merge", "--experts", tmp_path / "e0", tmp_path / "e1", *how)
    assert code == 0
    assert "with SVC(inner=TIES(" in out
    merged, name = open_expert(tmp_path / "both"), "model.norm.weight"
    expected = m.SVC(m.TIES(keep=0.3)).merge([expert[name] for expert in experts])
    assert torch.equal(merged[name].dense(), expected.dense())
    inner = merged.record["method"]["init_args"]["inner"]
    assert inner["class_path"].endswith(".TIES")
    assert inner["init_args"]["keep"] == 0.3
    code, out, _ = run("show", tmp_path / "both")
    assert code == 0
    assert "keep=0.3" in out
