"""A weight in any number of chunks merges as the whole weight does, for every form."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from testbed.random_deltas import deltas_of_one_weight, random_delta, seeds

import modular_experts.methods as m
from modular_experts.deltas import BlockSparse, Dense, Sparse
from modular_experts.methods.chunks import chunks_of, chunks_of_size, grouped, merge_by_chunks

sizes = st.sampled_from([1, 5, 16, 2**19])


def summed(chunk):
    total = chunk.zeros()
    for entries in chunk:
        entries.add_to(total)
    return total, None


@pytest.mark.parametrize(
    "method",
    [m.SparseAverage(exponent=0.5), m.Breadcrumbs(beta=0.3, gamma=0.1), m.DARETIES(keep=0.5), m.DELLA(keep=0.5)],
)
@given(size=sizes, deltas=deltas_of_one_weight(of=["Dense", "Sparse", "BlockSparse", "zero"]))
def test_result_does_not_depend_on_the_size_of_the_chunks(method, size, deltas):
    whole = method.merge(deltas)
    with chunks_of_size(size):
        found = method.merge(deltas)
    assert type(found) is type(whole)
    assert torch.equal(found.dense(), whole.dense())
    assert torch.equal(found.support(), whole.support())


@pytest.mark.parametrize("tile", [(3, 3), (2, 5)])
@given(size=sizes, numbers=st.lists(seeds, min_size=1, max_size=3))
def test_tiles_stay_tiles_and_are_never_cut(tile, size, numbers):
    deltas = [random_delta("BlockSparse", (7, 10), number, tile=tile) for number in numbers]
    with chunks_of_size(size):
        merged = merge_by_chunks(deltas, summed)
        first_rows = [chunk.rows[0] for chunk in chunks_of(deltas)]
    assert isinstance(merged, BlockSparse)
    assert merged.tile == tile
    assert set(merged.blocks.tolist()) == {block for delta in deltas for block in delta.blocks.tolist()}
    assert all(row % tile[0] == 0 for row in first_rows)


@given(
    size=sizes,
    most=st.sampled_from([1, 10, 2**17]),
    deltas=deltas_of_one_weight(),
    weight=st.floats(-2, 2, width=16),
    alike=st.booleans(),
)
def test_grouped_entries_are_those_of_the_experts(size, most, deltas, weight, alike):
    weights = [weight + (0 if alike else place) for place in range(len(deltas))]
    with chunks_of_size(size):
        for chunk in chunks_of(deltas):
            each, together = chunk.zeros(torch.float64), chunk.zeros(torch.float64)
            for entries, factor in zip(chunk, weights, strict=True):
                entries.add_to(each, factor=factor)
            pieces = list(grouped(chunk, weights, most))
            for entries, factor in pieces:
                entries.add_to(together, factor=factor)
            assert torch.equal(each, together)
            of_one = max(len(entries.values) for entries in chunk)
            assert all(len(entries.values) <= max(most, of_one) for entries, _ in pieces)


def test_a_kept_zero_stays_in_the_support():
    delta = Sparse(torch.tensor([1, 4], dtype=torch.int32), torch.tensor([0.0, 2.0]), torch.Size((2, 3)))
    merged = merge_by_chunks([delta], summed)
    assert merged.indices.tolist() == [1, 4]
    assert merged.indices.dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [2, 7, 20])
def test_averages_of_half_precision_are_the_true_ones_rounded_once(dtype, count):
    draw = torch.Generator().manual_seed(count)
    deltas = [Dense((torch.randn(200, 300, generator=draw)).to(dtype)) for _ in range(count)]
    exact = torch.stack([delta.values.double() for delta in deltas])
    assert torch.equal(m.Average().merge(deltas).values, (exact.sum(0) / count).to(dtype))
    weights = [0.5 + number for number in range(count)]
    found = m.Average(weights).merge(deltas).values
    weighted = torch.tensordot(torch.tensor(weights, dtype=torch.float64) / sum(weights), exact, dims=1)
    assert (found != weighted.to(dtype)).double().mean() < 1e-4
