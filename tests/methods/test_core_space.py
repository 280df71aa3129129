"""CoreSpace against dense bases in numpy: exact for linear methods, the same for any factors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from testbed.merging import merge_all
from testbed.random_deltas import random_delta, seeds

from modular_experts.deltas import Dense, LowRank, Sparse
from modular_experts.methods import EMR, TIES, CoreSpace, MagMax, RegMean, SelfRegMean
from modular_experts.methods.method import Context


def lora(shape, rank, seed):
    draw = torch.Generator().manual_seed(seed)
    sizes = ((shape[0], rank), (rank, shape[1]))
    return LowRank(*(torch.randn(*size, generator=draw, dtype=torch.float64) for size in sizes))


def cores(deltas):
    """Return the bases and the cores, from the singular value decompositions of the dense deltas."""
    dense = [delta.dense().double().numpy() for delta in deltas]

    def basis(matrices):
        left, values, _ = np.linalg.svd(np.concatenate(matrices, axis=1), full_matrices=False)
        return left[:, values > 1e-7 * values[0]]

    outputs, inputs = basis(dense), basis([matrix.T for matrix in dense])
    return outputs, inputs, [Dense(torch.from_numpy(outputs.T @ matrix @ inputs)) for matrix in dense]


def in_core_space(deltas, method):
    outputs, inputs, small = cores(deltas)
    return outputs @ method.merge(small).dense().numpy() @ inputs.T


@pytest.mark.parametrize("method", [TIES(), MagMax(), SelfRegMean()], ids=str)
@given(st.lists(seeds, min_size=1, max_size=3, unique=True), st.sampled_from([(12, 9), (7, 15)]))
def test_core_space_equals_the_formula(method, numbers, shape):
    deltas = [lora(shape, 1 + seed % 3, seed) for seed in numbers]
    merged = CoreSpace(method, scale=0.6).merge(deltas).dense()
    np.testing.assert_allclose(merged.numpy(), 0.6 * in_core_space(deltas, method), rtol=1e-6, atol=1e-7)


def test_another_product_of_the_same_delta_merges_to_the_same():
    deltas = [lora((12, 9), 2, seed) for seed in range(3)]
    turn = torch.tensor([[3.0, 1.0], [0.5, -2.0]], dtype=torch.float64)
    turned = [LowRank(delta.up @ turn, torch.linalg.inv(turn) @ delta.down) for delta in deltas]
    longer = LowRank(torch.cat([deltas[0].up, deltas[1].up], 1), torch.cat([deltas[0].down, 0 * deltas[1].down]))
    for others in (turned, [longer, *deltas[1:]]):
        torch.testing.assert_close(CoreSpace().merge(others).dense(), CoreSpace().merge(deltas).dense())


def test_the_result_is_of_the_rank_of_all_experts_and_nothing_is_made_dense(monkeypatch):
    loras = [lora((60, 70), rank, rank) for rank in (1, 2, 3)]
    expected = in_core_space(loras, TIES())
    monkeypatch.setattr(LowRank, "add_to", None)
    monkeypatch.setattr(LowRank, "dense", None)
    merged = CoreSpace().merge([*loras, Sparse.zero((60, 70))])
    monkeypatch.undo()
    assert merged.rank == 6
    np.testing.assert_allclose(merged.dense().numpy(), expected, rtol=1e-6, atol=1e-8)


def test_other_forms_and_vectors_are_merged_as_they_are():
    mixed = [lora((8, 6), 2, 0), random_delta("Sparse", (8, 6), 1)]
    vectors = [Dense(torch.tensor([5.0, -1.0, 3.0])), Dense(torch.tensor([-7.0, 0.0, 2.0]))]
    for deltas in (mixed, [random_delta("Dense", (8, 6), seed) for seed in range(2)], vectors):
        alone = TIES().merge(deltas).dense()
        torch.testing.assert_close(CoreSpace(scale=2.0).merge(deltas).dense(), 2.0 * alone)


def test_a_look_at_all_weights_sees_the_cores():
    stream = [[lora(shape, 2, 10 * n + len(shape)) for n in range(3)] for shape in [(9, 12), (14, 8)]]
    found = merge_all(CoreSpace(TIES(scope="global")), stream)
    inner = merge_all(TIES(scope="global"), [cores(deltas)[2] for deltas in stream])
    for merged, core, deltas in zip(found, inner, stream, strict=True):
        outputs, inputs, _ = cores(deltas)
        np.testing.assert_allclose(merged.dense().numpy(), outputs @ core.dense().numpy() @ inputs.T, atol=1e-8)


def test_experts_of_tasks_and_statistics():
    deltas = [lora((9, 12), 2, seed) for seed in range(2)]
    assert CoreSpace(EMR()).has_tasks
    assert not CoreSpace().has_tasks
    with pytest.raises(ValueError, match=r"CoreSpace: RegMean needs gram statistics .* in the core space"):
        CoreSpace(RegMean())
    context = Context(prepared=EMR().prepare([cores(deltas)[2]]))
    for expert in range(2):
        outputs, inputs, small = cores(deltas)
        own = EMR().per_task(small, expert, context).dense().numpy()
        np.testing.assert_allclose(
            CoreSpace(EMR()).per_task(deltas, expert, context).dense().numpy(), outputs @ own @ inputs.T, atol=1e-8
        )
