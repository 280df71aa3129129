"""Passes over entries: the bits equal torch's, and only the entries of a part are read or written."""

import math

import conftest
import pytest
import torch
from testbed.pairwise import pairwise
from testbed.random_deltas import Held
from torch import Tensor

import modular_experts.methods as m
from modular_experts.base import Base
from modular_experts.deltas import BlockSparse, Delta, Sparse
from modular_experts.deltas.tiles import entries_in_order, gather_tiles, tile_grid
from modular_experts.methods.chunks import chunks_of_size, merge_by_chunks
from modular_experts.native import sparse_passes as entries
from modular_experts.native.sparse_passes import (
    CompiledSums,
    add_rounded,
    compiled_sums,
    pack_entries,
    split_rows,
    spread_tiles,
)

SHAPE = torch.Size((150, 200))
SHARES = [0.3, 0.0, 1.0, 0.02, 0.5]


@pytest.fixture(autouse=True)
def compiled() -> None:
    if entries.compiled_passes() is None:
        pytest.skip("no C++ compiler makes the passes here")


def _sparse(share: float, seed: int, shape: torch.Size = SHAPE) -> Sparse:
    draw = torch.Generator().manual_seed(seed)
    places = (torch.rand(shape.numel(), generator=draw) < share).nonzero()[:, 0].int()
    values = torch.randn(len(places), generator=draw) * 10 ** torch.randn(len(places), generator=draw)
    values[torch.rand(len(places), generator=draw) < 0.1] = 0.0
    return Sparse(places, values, shape)


def _runs(deltas: list[Sparse]) -> CompiledSums:
    runs = compiled_sums(deltas)
    assert runs is not None
    return runs


def _rounded(weight: Tensor, places: Tensor, values: Tensor) -> entries.Added:
    return add_rounded(weight, Sparse(places, values, weight.shape), torch.bfloat16)


def _tiles(share: float, seed: int, tile: tuple[int, int]) -> BlockSparse:
    draw = torch.Generator().manual_seed(seed)
    blocks = (torch.rand(math.prod(tile_grid(SHAPE, tile)), generator=draw) < share).nonzero()[:, 0].int()
    values = torch.randn(math.prod(SHAPE), generator=draw).view(SHAPE)
    return BlockSparse(blocks, gather_tiles(values, blocks, tile), SHAPE)


def _by_torch(deltas: list[Sparse], weights: list[float]) -> Tensor:
    """Return the sum as torch takes it: in float64, in the order of the experts."""
    total = torch.zeros(SHAPE.numel(), dtype=torch.float64)
    alike = len(set(weights)) == 1
    for delta, weight in zip(deltas, weights, strict=True):
        total.index_add_(0, delta.indices, delta.values.double(), alpha=1.0 if alike else weight)
    return total.mul_(weights[0]) if alike else total


@pytest.mark.parametrize(("weights", "parts"), [([1.0] * 5, 1), ([0.3] * 5, 2), ([0.7, -2.0, 1e-3, 0.0, 1 / 3], 7)])
def test_sums_are_those_of_torch_to_the_last_bit(weights, parts) -> None:
    deltas = [_sparse(share, seed) for seed, share in enumerate(SHARES)]
    runs, edges = _runs(deltas), torch.linspace(0, SHAPE.numel(), parts + 1).int()
    totals, kept, counts, movers = [], [], [], []
    for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        here = [slice(*torch.searchsorted(d.indices, torch.tensor([start, stop])).tolist()) for d in deltas]
        total, support = runs.total(start, stop, here, weights)
        totals.append(total)
        kept.append(support)
        counts.append(runs.counts(start, stop, here))
        movers.append(runs.counts(start, stop, here, moved=True))
    assert torch.equal(torch.cat(totals), _by_torch(deltas, weights))
    ones = torch.stack([delta.dense().view(-1) for delta in deltas])
    assert torch.equal(torch.cat(movers), ones.ne(0).sum(0).double())
    supports = torch.zeros(5, SHAPE.numel())
    for row, delta in zip(supports, deltas, strict=True):
        row[delta.indices.long()] = 1.0
    assert torch.equal(torch.cat(counts), supports.sum(0).double())
    assert torch.equal(torch.cat(kept), supports.any(0))


@pytest.mark.parametrize("weights", [[0.3] * 5, [0.7, -2.0, 1e-3, 0.0, 1 / 3]], ids=["alike", "different"])
def test_a_packed_total_is_the_total_packed(weights) -> None:
    deltas = [_sparse(share, seed) for seed, share in enumerate([0.3, 0.0, 0.1, 0.02, 0.5])]
    runs, size, here = _runs(deltas), SHAPE.numel(), [slice(0, len(delta.indices)) for delta in deltas]
    total, kept = runs.total(0, size, here, weights)
    places, values = runs.packed_total(size, weights)
    assert torch.equal(places, kept.nonzero()[:, 0].int())
    assert torch.equal(values.view(torch.int32), total[kept].float().view(torch.int32))


@pytest.mark.parametrize("wrong", [[-1], [29_999, 5], [30_000], [-(2**31)]], ids=str)
def test_places_outside_of_the_part_or_of_the_weight_are_refused(wrong) -> None:
    good = _sparse(0.5, 0)
    bad = torch.cat([torch.tensor(wrong, dtype=torch.int32), good.indices])
    runs = _runs([Sparse(bad, torch.ones(len(bad)), SHAPE)])
    places = torch.arange(5000, dtype=torch.int32)
    places[-1] = wrong[0] if len(wrong) == 1 else 2**31 - 1
    for add in (
        lambda: runs.total(0, SHAPE.numel(), [slice(0, len(bad))], [1.0]),
        lambda: runs.counts(0, SHAPE.numel(), [slice(0, len(bad))]),
        lambda: _rounded(torch.zeros(SHAPE).bfloat16(), places, torch.ones(5000)),
    ):
        with pytest.raises(IndexError, match="not sorted or not in its weight"):
            add()


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_what_is_kept_is_packed_in_order(share) -> None:
    draw = torch.Generator().manual_seed(3)
    total = torch.randn(20_000, generator=draw, dtype=torch.float64) * 1e30
    total[:4] = torch.tensor([math.nan, math.inf, -0.0, 1e300])
    kept = torch.rand(20_000, generator=draw) < share
    places, values = torch.full((20_007,), -7, dtype=torch.int32), torch.full((20_007,), -7.0)
    count = pack_entries(total, kept, 10**6, places, values)
    assert count == int(kept.sum())
    assert torch.equal(places[:count], 10**6 + kept.nonzero()[:, 0].int())
    assert torch.equal(values[:count].view(torch.int32), total[kept].float().view(torch.int32))
    assert values[20_000:].eq(-7).all()
    assert places[20_000:].eq(-7).all()


def test_a_sum_is_rounded_once_and_counted() -> None:
    delta, draw = _sparse(0.4, 5), torch.Generator().manual_seed(6)
    weight = (torch.randn(SHAPE, generator=draw) * 10 ** torch.randn(SHAPE, generator=draw)).bfloat16()
    before = weight.clone()
    found = add_rounded(weight, delta, torch.bfloat16)
    assert torch.equal(weight, before)
    exact = weight.float().view(-1).index_add(0, delta.indices, delta.values).view(SHAPE)
    assert torch.equal(found.weight.view(torch.int16), exact.bfloat16().view(torch.int16))
    assert found.moved == int(delta.values.count_nonzero())
    assert found.changed == int((found.weight != before).sum())
    assert found.lost == pytest.approx(float((exact.bfloat16().double() - exact.double()).square().sum()), rel=1e-12)
    assert found.norm == pytest.approx(float(delta.values.double().square().sum()), rel=1e-12)


def test_rounding_at_the_edges_is_that_of_torch() -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    weight = bits.view(torch.bfloat16).view(256, 256)  # every number there is
    places = torch.arange(2**16, dtype=torch.int32)
    for value in (0.0, -0.0, 2**-8, 1 + 2**-8, 1 + 3 * 2**-8, 3.3e38, math.inf, math.nan, 1e-45):
        values = torch.full((2**16,), value)
        wanted = (weight.float() + value).bfloat16()
        found = _rounded(weight, places, values).weight
        assert torch.equal(found.isnan(), wanted.isnan())
        same = found.view(torch.int16) == wanted.view(torch.int16)
        assert (same | wanted.isnan()).all(), value
    odd = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32).view(
        torch.float32
    )  # rounded as numbers: finite
    found = _rounded(torch.zeros(256, 256).bfloat16(), places[:6000], odd.repeat(2000)).weight
    assert found.view(-1)[:6000].isnan().all()


@pytest.mark.parametrize(
    ("shape", "tile", "share"),
    pairwise([(160, 208), (150, 200), (6000, 1)], [(16, 16), (1, 200), (150, 1), (7, 300)], [0.5, 1.0]),
    ids=str,
)
def test_tiles_are_spread_as_torch_does(shape, tile, share) -> None:
    count = math.prod(tile_grid(shape, tile))
    draw = torch.Generator().manual_seed(5)
    blocks = (torch.rand(count, generator=draw) < share).nonzero()[:, 0].int()
    tiles = torch.randn(len(blocks), *tile, generator=draw)
    found = spread_tiles(BlockSparse(blocks, tiles, torch.Size(shape)))
    wanted_entries = entries_in_order(blocks, tiles, shape)
    for mine, wanted in zip((found.indices, found.values), wanted_entries, strict=True):
        assert mine.dtype == wanted.dtype
        assert torch.equal(mine, wanted)


@pytest.mark.parametrize("shape", [(150, 200), (3, 2**16), (9000, 7)], ids=str)
def test_places_are_split_into_rows_and_columns(shape) -> None:
    kept = torch.rand(math.prod(shape), generator=torch.Generator().manual_seed(2)) < 0.3
    kept.view(shape)[[0, -2]] = False  # rows without a place
    places = kept.nonzero()[:, 0].int()
    starts, columns = split_rows(places, *shape)
    assert starts.tolist() == [0, *kept.view(shape).sum(1).cumsum(0).tolist()]
    assert torch.equal(columns.int() & 0xFFFF, places % shape[1])
    with pytest.raises(IndexError, match="not sorted or not in its weight"):
        split_rows(places, shape[0] - 1, shape[1])  # places lie beyond the last row
    assert split_rows(places, 1, 2**16 + 1) is None


def test_tiles_that_are_none_of_the_weight_write_no_further_than_there_is_room() -> None:
    blocks = torch.tensor([-(2**31), -7, 3, 2, 2, 99, 2**31 - 1], dtype=torch.int32)
    tiles = torch.ones(7, 30, 30)
    room = torch.full((2, tiles.numel() + 999), -7.0)
    places, values = room[0].int(), room[1]
    sizes = [*tiles.shape, 100, 95]
    out = [places.data_ptr(), values.data_ptr()]
    assert entries.compiled_passes().spread_tiles(blocks.data_ptr(), tiles.data_ptr(), *sizes, *out) <= tiles.numel()
    assert places[tiles.numel() :].eq(-7).all()
    assert values[tiles.numel() :].eq(-7).all()


@pytest.mark.parametrize(
    ("method", "tile"),
    [
        (m.SparseAverage(exponent=0.5), (5, 7)),
        (m.TIES(keep=0.3), (16, 16)),
        (m.Breadcrumbs(beta=0.3, gamma=0.1), (5, 7)),
    ],
)
def test_a_merge_of_tiles_is_that_of_torch_to_the_last_bit(method, tile, monkeypatch) -> None:
    deltas = [_tiles(0.4, seed, tile) for seed in range(4)]
    compiled = method.merge(deltas)
    monkeypatch.setattr(entries, "LEAST", 2**62)  # as where there is no compiler
    plain = method.merge(deltas)
    assert isinstance(compiled, BlockSparse)
    assert torch.equal(compiled.blocks, plain.blocks)
    assert torch.equal(compiled.values, plain.values)


def test_all_else_is_computed_in_torch() -> None:
    delta = _sparse(0.5, 0)
    places, values = delta.indices, delta.values
    for own, its in (
        *((places.long(), values), (places, values.double()), (places[::2], values[::2]), (places[:9], values[:9])),
        *((places, values[:9]), (places, values.clone().requires_grad_()), (places, torch._neg_view(values))),
    ):
        assert compiled_sums([Sparse(own, its, SHAPE)]) is None
    assert compiled_sums([]) is None
    for weight, dtype in (
        (torch.zeros(SHAPE), torch.float32),
        (torch.zeros(SHAPE).half(), torch.float16),
        (torch.zeros(SHAPE).bfloat16(), torch.float32),
    ):
        assert torch.equal(add_rounded(weight, delta, dtype).weight, delta.dense().to(dtype))
    total, kept = torch.rand(5000), torch.rand(5000) < 0.5
    room = torch.empty(5000, dtype=torch.int32), torch.empty(5000)
    count = pack_entries(total, kept, 7, *room)
    assert torch.equal(room[0][:count], kept.nonzero()[:, 0].int() + 7)
    assert torch.equal(room[1][:count], total[kept])


@pytest.mark.parametrize(
    "method",
    [
        m.Average(),
        m.Average([3.0, 1.0, 1.0, 0.5, -1.0]),
        m.SparseAverage(scale=1.7, exponent=0.5),
        m.SparseAverage(count="supports"),
        m.Intersection(agreement=2),
        m.ConsensusTA(),
        m.EMR(),
    ],
    ids=repr,
)
def test_merges_are_the_same_without_a_compiler(method: m.MergeMethod, monkeypatch) -> None:
    deltas, found = [_sparse(share, seed) for seed, share in enumerate(SHARES)], []
    for least in (entries.LEAST, 2**62):  # 2**62 as where there is no compiler
        monkeypatch.setattr(entries, "LEAST", least)
        with chunks_of_size(8000):  # four chunks of the weight
            found.append(method.merge(deltas))
    one, other = found
    assert type(one) is type(other)
    assert torch.equal(one.indices, other.indices)
    assert torch.equal(one.values, other.values)


def test_a_merge_lies_on_the_cpu_whatever_the_default_device_is_and_gradients_flow_through_it() -> None:
    delta = _sparse(0.5, 0)
    with torch.device("meta"):
        merged = m.Average().merge([delta])
    assert torch.equal(merged.values, delta.values)
    values = delta.values.clone().requires_grad_()
    assert m.Average().merge([Sparse(delta.indices, values, SHAPE)]).values.requires_grad


def test_a_result_that_keeps_little_does_not_hold_much() -> None:
    few = _sparse(0.2, 1)
    merged = merge_by_chunks([few, few], lambda part: part.weighted_total([1.0, 1.0]))
    assert torch.equal(merged.indices, few.indices)
    assert merged.values.untyped_storage().nbytes() == 4 * len(few.values)


@pytest.mark.parametrize("tile", [None, (5, 7)], ids=str)
def test_a_written_checkpoint_is_the_same_without_a_compiler(tile, tmp_path, monkeypatch) -> None:
    model, found = conftest.build_model("llama").bfloat16(), []
    model.save_pretrained(tmp_path / "base")
    name = "model.layers.0.mlp.up_proj.weight"
    values = torch.randn(48, 32, generator=torch.Generator().manual_seed(7))
    units = torch.arange(0, math.prod(tile_grid(values.shape, tile or (1, 1))), 3, dtype=torch.int32)
    delta: Delta = Sparse(units, values.view(-1)[units], values.shape)
    if tile:
        delta = BlockSparse(units, gather_tiles(values, units, tile), values.shape)
    for number, least in enumerate((1, 2**62)):
        monkeypatch.setattr(entries, "LEAST", least)
        out = tmp_path / str(number)
        checked = Base.open(tmp_path / "base").write(Held({name: delta}), out)
        assert checked is not None
        found.append(((out / "model.safetensors").read_bytes(), checked.rounding))
    (one, counted), (other, recounted) = found
    assert one == other
    assert counted.moved == recounted.moved > 0
    assert counted.unchanged == recounted.unchanged
    assert counted.lost == pytest.approx(recounted.lost, rel=1e-5)
    assert counted.lost > 0


def test_a_sum_that_is_not_finite_is_refused_in_one_pass_too(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(entries, "LEAST", 1)
    conftest.build_model("llama").bfloat16().save_pretrained(tmp_path / "base")
    large = Sparse(torch.tensor([3], dtype=torch.int32), torch.tensor([3.4e38]), torch.Size((48, 32)))
    with pytest.raises(ValueError, match=r"is not finite in torch.bfloat16"):
        Base.open(tmp_path / "base").write(Held({"model.layers.0.mlp.up_proj.weight": large}), tmp_path / "out")
