"""Deltas: the algebra of every mix of forms equals dense float64 arithmetic, and stays in the cheapest exact form."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from testbed.random_deltas import FORMS, deltas_of_one_weight, random_delta, seeds, shapes

from modular_experts.deltas import BlockSparse, Dense, LowRank, Sparse, add

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def dense(delta):
    """The delta entry by entry, in float64, without any of the methods under test."""
    if isinstance(delta, Dense):
        return delta.values.double()
    if isinstance(delta, LowRank):
        return delta.up.double() @ delta.down.double()
    full = torch.zeros(delta.shape, dtype=torch.float64)
    if isinstance(delta, Sparse):
        for index, value in zip(delta.indices.tolist(), delta.values.tolist(), strict=True):
            full[divmod(index, delta.shape[1])] = value
        return full
    height, width = delta.values.shape[1:]
    wide = -(-delta.shape[1] // width)
    for block, tile in zip(delta.blocks.tolist(), delta.values.double(), strict=True):
        rows, columns = block // wide * height, block % wide * width
        part = full[rows : rows + height, columns : columns + width]
        part += tile[: part.shape[0], : part.shape[1]]
    return full


@given(deltas_of_one_weight())
def test_dense_form_is_the_entries_and_the_norm_is_theirs(deltas):
    for delta in deltas:
        torch.testing.assert_close(delta.dense().double(), dense(delta), **CLOSE)
        assert delta.norm() == pytest.approx(dense(delta).norm().item(), rel=1e-7, abs=1e-7)


@given(deltas_of_one_weight(), st.randoms(use_true_random=False))
def test_sum_is_dense_float64_sum_in_any_order(deltas, random):
    expected = sum(dense(delta) for delta in deltas)
    torch.testing.assert_close(dense(add(deltas)), expected, **CLOSE)
    random.shuffle(deltas)
    torch.testing.assert_close(dense(add(deltas)), expected, **CLOSE)


@given(deltas_of_one_weight(least=3, most=3), st.floats(-4, 4))
def test_vector_space_laws(deltas, factor):
    a, b, c = deltas
    torch.testing.assert_close(dense((a + b) + c), dense(a + (b + c)), **CLOSE)
    torch.testing.assert_close(dense(factor * (a + b)), dense(factor * a + b * factor), **CLOSE)
    torch.testing.assert_close(dense(a - b), dense(a) - dense(b), **CLOSE)
    torch.testing.assert_close(dense(-a), -dense(a), **CLOSE)
    assert not dense(a - a).abs().max() > 1e-12


@given(deltas_of_one_weight(), seeds)
def test_linear_is_a_product_with_the_dense_form(deltas, seed):
    for delta in deltas:
        x = torch.randn(2, 5, delta.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        torch.testing.assert_close(delta.linear(x), x @ dense(delta).T, **CLOSE)


@given(deltas_of_one_weight())
def test_transpose_keeps_form_and_comes_back(deltas):
    for delta in deltas:
        assert type(delta.T) is type(delta)
        torch.testing.assert_close(dense(delta.T), dense(delta).T, **CLOSE)
        torch.testing.assert_close(dense(delta.T.T), dense(delta), **CLOSE)
        assert delta.T.support_size == delta.support_size


@given(deltas_of_one_weight())
def test_support_is_sorted_unique_and_covers_every_moved_entry(deltas):
    for delta in deltas:
        support = delta.support().tolist()
        assert support == sorted(set(support))
        assert len(support) == delta.support_size
        assert set(dense(delta).view(-1).nonzero()[:, 0].tolist()) <= set(support)


@given(deltas_of_one_weight(least=2, of=["Sparse", "zero"]))
def test_sparse_sum_keeps_the_union_of_supports(deltas):
    total = add(deltas)
    assert isinstance(total, Sparse)
    assert set(total.indices.tolist()) == {index for delta in deltas for index in delta.indices.tolist()}


@pytest.mark.parametrize("shape", [(6, 9), (7, 8), (1, 1), (3, 10)])
def test_tiles_of_one_size_stay_tiles_and_of_two_become_entries(shape):
    one, other = random_delta("BlockSparse", shape, 1), random_delta("BlockSparse", shape, 2)
    assert isinstance(one + other, BlockSparse)
    assert set((one + other).blocks.tolist()) == set(one.blocks.tolist()) | set(other.blocks.tolist())
    mixed = one + random_delta("BlockSparse", shape, 3, tile=(2, 2))
    assert isinstance(mixed, Sparse)


def test_low_rank_sum_stays_low_rank_while_its_factors_are_smaller():
    parts = [random_delta("LowRank", (12, 12), seed) for seed in (0, 2, 4)]  # rank 1 each
    assert add(parts).rank == 3
    assert isinstance(add(parts * 3), Dense)
    assert isinstance(random_delta("Sparse", (6, 7), 1) + random_delta("LowRank", (6, 7), 1), Dense)


@pytest.mark.parametrize("form", FORMS)
def test_zero_changes_nothing(form):
    delta = random_delta(form, (6, 7), 5)
    total = add([Sparse.zero((6, 7)), delta, Sparse.zero((6, 7))])
    assert type(total) is type(delta)
    assert torch.equal(dense(total), dense(delta))


@given(shapes, seeds, st.sampled_from(FORMS))
def test_add_to_bfloat16_rounds_once(shape, seed, form):
    delta = random_delta(form, shape, seed, dtype=torch.float32)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
    expected = (weight.double() + delta.dense().double()).float().bfloat16()
    if form == "LowRank":  # the product itself is a float32 one, so allow the last bit
        torch.testing.assert_close(delta.add_to(weight.clone()), expected, rtol=2**-7, atol=1e-6)
    else:
        assert torch.equal(delta.add_to(weight.clone()), expected)


def test_different_shapes_and_nothing_at_all_are_refused():
    with pytest.raises(ValueError, match="different weights"):
        add([Sparse.zero((2, 3)), Sparse.zero((3, 2))])
    with pytest.raises(ValueError, match="at least one"):
        add([])


def test_deltas_are_immutable_and_move_together():
    delta = random_delta("Sparse", (4, 4), 0)
    with pytest.raises(AttributeError):
        delta.values = delta.values
    cast = delta.to(dtype=torch.float32)
    assert (cast.values.dtype, cast.indices.dtype) == (torch.float32, torch.int32)
    assert delta.values.dtype == torch.float64
