"""How far a stored tensor moved, and which differences are held entry by entry."""

import pytest
import torch

from modular_experts.deltas import Sparse
from modular_experts.interop.mergekit.inputs import WeightDifference, weight_difference

KINDS = [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32), (torch.float32, torch.bfloat16)]


def pair(share, kinds, shape=(40, 30)):
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=draw).to(kinds[1])
    changed = torch.rand(shape, generator=draw) < share
    tuned = torch.where(changed, start.double() + 0.5, start.double()).to(kinds[0])
    return tuned, start


@pytest.mark.parametrize("kinds", KINDS, ids=str)
def test_few_moved_entries_are_single_ones_and_many_are_read_from_the_files(kinds):
    for chunk in (7, 2**18):
        tuned, start = pair(0.05, kinds)
        packed = weight_difference(tuned, start, torch.float32, chunk=chunk)
        assert isinstance(packed, Sparse)
        assert (packed.dtype, packed.indices.dtype) == (torch.float32, torch.int32)
        assert packed.support_size == int((tuned.double() != start.double()).sum())
        assert torch.equal(packed.dense(), (tuned.double() - start.double()).float())
    tuned, start = pair(0.3, kinds)
    whole = weight_difference(tuned, start, torch.float32)
    assert isinstance(whole, WeightDifference)
    assert (whole.shape, whole.dtype) == (tuned.shape, torch.float32)
    assert torch.equal(whole.dense(), (tuned.double() - start.double()).float())
    assert torch.equal(whole.rows(3, 9), whole.values[3:9])


def test_rows_never_write_to_the_file():
    tuned, start = pair(0.5, (torch.float32, torch.float32))
    before = tuned.clone()
    WeightDifference(tuned, start, torch.float32).rows(3, 9)
    WeightDifference(tuned, start, torch.float32).add_to(torch.zeros(40, 30))
    assert torch.equal(tuned, before)


def test_nothing_moved_is_empty_and_a_scalar_has_one_row():
    tuned, _ = pair(0, KINDS[0])
    assert weight_difference(tuned, tuned.clone(), torch.float32).is_empty
    moved = weight_difference(torch.tensor(2.0), torch.tensor(0.5), torch.float32)
    assert (moved.shape, moved.dense().item(), moved.rows(0, 1).tolist()) == ((), 1.5, [1.5])
