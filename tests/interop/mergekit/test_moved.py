"""How far a stored tensor moved, and what of it is held entry by entry."""

import pytest
import torch

from modular_experts.deltas import Sparse
from modular_experts.interop.mergekit import moved
from modular_experts.interop.mergekit.moved import Moved

KINDS = [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32), (torch.float32, torch.bfloat16)]


def pair(share, kinds, shape=(40, 30)):
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=draw).to(kinds[1])
    changed = torch.rand(shape, generator=draw) < share
    tuned = torch.where(changed, start.double() + 0.5, start.double()).to(kinds[0])
    return tuned, start


@pytest.mark.parametrize("kinds", KINDS, ids=str)
@pytest.mark.parametrize("chunk", [7, 2**18])
def test_few_moved_entries_are_packed_without_a_loss(monkeypatch, kinds, chunk):
    monkeypatch.setattr(moved, "_CHUNK", chunk)
    tuned, start = pair(0.05, kinds)
    packed = Moved(tuned, start, torch.float32).packed()
    assert isinstance(packed, Sparse)
    assert packed.dtype == torch.float32
    assert packed.indices.dtype == torch.int32
    assert packed.support_size == int((tuned.double() != start.double()).sum())
    assert torch.equal(packed.dense(), (tuned.double() - start.double()).float())


@pytest.mark.parametrize("kinds", KINDS, ids=str)
def test_many_moved_entries_stay_a_view_of_the_file(kinds):
    tuned, start = pair(0.3, kinds)
    whole = Moved(tuned, start, torch.float32)
    assert whole.packed() is whole
    assert torch.equal(whole.dense(), (tuned.double() - start.double()).float())


def test_rows_never_write_to_the_file():
    tuned, start = pair(0.5, (torch.float32, torch.float32))
    before = tuned.clone()
    Moved(tuned, start, torch.float32).rows(3, 9)
    assert torch.equal(tuned, before)


def test_nothing_moved_is_packed_to_nothing():
    tuned, _ = pair(0, KINDS[0])
    assert Moved(tuned, tuned.clone(), torch.float32).packed().is_empty
    scalar = torch.tensor(2.0)
    assert Moved(scalar, torch.tensor(1.0), torch.float32).packed().shape == ()
