"""Check that a merge method, built-in or your own, keeps its promises: `check_merge_method(MyMethod())`."""

import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from modular_experts.deltas import BlockSparse, Delta, Dense, LowRank, Sparse
from modular_experts.deltas.tiles import gather_tiles, index_dtype, tile_grid
from modular_experts.library import make_record, open_expert, write_expert
from modular_experts.merging.merged import Merged, write_merged
from modular_experts.methods import MergeMethod
from modular_experts.methods.chunks import widest_dtype
from modular_experts.methods.method import Context, DataStatistic

FORMS = ("Dense", "LowRank", "Sparse", "BlockSparse")
_SHAPES = ((6, 8), (7, 5), (1, 9), (9, 1), (1, 1))


def check_merge_method(
    method: MergeMethod,
    alone: bool = False,
    copies: bool = False,
    order: bool = False,
    zero: bool = False,
    sparse: bool = False,
) -> None:
    """Check that a merge method keeps the contract of `MergeMethod`, and its further promises.

    Always checked: deltas of every form, in every mix of two, of matrices and vectors, down to one entry, give a finite
    delta of the weight's shape and the deltas' widest dtype; what it was given stays as it was; the same call gives
    the same result; experts that move nothing merge to nothing; a `scale` is a factor of the result, and a common
    positive factor of the experts one too; stored experts merge as deltas in memory do.

    Args:
        method: The method; where it needs statistics, the battery makes them up.
        alone: One expert merges to itself.
        copies: And so do copies of it.
        order: The order of the experts does not matter.
        zero: An expert that moves nothing, at the end of the list, changes nothing.
        sparse: Sparse experts merge to a sparse one within the union of their supports, tiles to tiles.

    Raises:
        AssertionError: The method breaks a promise, which the message names.
    """
    for shape in _SHAPES:
        for forms in [*itertools.combinations_with_replacement(FORMS, 2), FORMS]:
            _check_mix(method, [made_delta(form, shape, seed) for seed, form in enumerate(forms)])
        if zero:
            deltas = [made_delta(form, shape, seed) for seed, form in enumerate(FORMS)]
            more = _merged(method, [*deltas, Sparse.zero(shape)])
            close(more, _merged(method, deltas), "an expert that moves nothing must change nothing")
    _check_mix(method, [Dense(torch.randn(5)), Sparse(torch.tensor([3]), torch.tensor([2.0]), torch.Size([5]))])
    nothing = Sparse.zero((4, 6))
    still = Dense(torch.zeros(4, 6))
    for zeros in ([nothing, nothing], [still, still], [nothing, still]):
        assert not _merged(method, zeros).any(), "experts that move nothing must merge to nothing"
    for form in FORMS if alone else ():
        delta = made_delta(form, (6, 8), 3)
        close(_merged(method, [delta]), delta.dense(), "one expert must merge to itself")
        if copies:
            close(_merged(method, [delta, delta, delta]), delta.dense(), "copies of an expert must merge to it")
    if order:
        _check_order(method)
    if sparse:
        _check_sparse(method)
    _check_stored(method)


def _check_order(method: MergeMethod) -> None:
    for forms in (FORMS, ("Sparse", "Sparse", "Sparse")):
        deltas = [made_delta(form, (6, 8), seed) for seed, form in enumerate(forms)]
        expected = _merged(method, deltas)
        for turned in (deltas[::-1], [*deltas[1:], deltas[0]]):
            close(_merged(method, turned), expected, "the order of the experts must not matter")


def _check_sparse(method: MergeMethod) -> None:
    for form, shape in itertools.product(("Sparse", "BlockSparse"), _SHAPES[:2]):
        deltas = [made_delta(form, shape, seed) for seed in range(3)]
        merged = method.merge(deltas, _context(method, deltas))
        assert type(merged).__name__ == form, f"{form} experts must merge to a {form} one, got {merged!r}"
        kept = set().union(*(delta.support().tolist() for delta in deltas))
        assert set(merged.support().tolist()) <= kept, "the result must stay within the union of the supports"


def _check_mix(method: MergeMethod, deltas: Sequence[Delta]) -> None:
    before = [{name: tensor.clone() for name, tensor in delta.tensors().items()} for delta in deltas]
    merged = method.merge(deltas, _context(method, deltas))
    mix = ", ".join(type(delta).__name__ for delta in deltas)
    assert isinstance(merged, Delta), f"merge must return a delta, got {type(merged).__name__} for {mix}"
    assert merged.shape == deltas[0].shape, f"the result must have the weight's shape, got {merged!r} for {mix}"
    assert merged.dtype == widest_dtype(deltas), f"the result must have the widest dtype, got {merged!r} for {mix}"
    assert merged.dense().isfinite().all(), f"the result must be finite for {mix} of shape {tuple(merged.shape)}"
    for delta, tensors in zip(deltas, before, strict=True):
        for name, tensor in delta.tensors().items():
            assert torch.equal(tensor, tensors[name]), f"merge must not change what it is given, for {mix}"
    again = _merged(method, deltas)
    assert torch.equal(again, merged.dense()), f"the same call must give the same result, for {mix}"
    close(_merged(method, [delta * 2.0 for delta in deltas]), 2 * again, "twice the experts must merge to twice it")
    if is_dataclass(method) and "scale" in {field.name for field in fields(method)}:
        scale: float = method.scale
        half = replace(method, scale=0.5 * scale)
        close(_merged(half, deltas), 0.5 * again, "the scale must be a factor of the result")


def _check_stored(method: MergeMethod) -> None:
    if method.needs.statistics:
        return  # theirs are on disk, beside the experts, and hold for real ones
    record = make_record("battery", {"id": "none", "fingerprint": "none"})
    weights = {"a.weight": (6, 8), "b.weight": (7, 5)}
    with tempfile.TemporaryDirectory() as folder:
        experts = []
        for seed, form in enumerate(("Sparse", "BlockSparse", "LowRank")):
            deltas = [(name, made_delta(form, shape, seed)) for name, shape in weights.items()]
            write_expert(Path(folder, f"e{seed}"), deltas, record)
            experts.append(open_expert(Path(folder, f"e{seed}")))
        stored = write_merged(Merged(experts, method), Path(folder, "merged"))
        prepared = method.prepare([[expert[name] for expert in experts] for name in weights])
        for name in weights:
            context = Context(name, prepared=prepared)
            expected = method.merge([expert[name] for expert in experts], context).dense()
            assert torch.equal(stored[name].dense(), expected), "stored experts must merge as deltas in memory do"


def _context(method: MergeMethod, deltas: Sequence[Delta]) -> Context:
    kind = method.needs.statistics
    statistics = [made_statistic(kind, deltas[0].shape, seed) for seed in range(len(deltas))] if kind else None
    return Context("weight", statistics, method.prepare([deltas]))


def _merged(method: MergeMethod, deltas: Sequence[Delta]) -> Tensor:
    return method.merge(deltas, _context(method, deltas)).dense()


def made_statistic(kind: str | None, shape: torch.Size, seed: int) -> DataStatistic | None:
    draw = torch.Generator().manual_seed(100 + seed)
    if kind == "fisher":
        return DataStatistic(torch.rand(shape, generator=draw) + 0.1)
    if kind is None or len(shape) != 2:
        return None
    inputs = torch.randn(20, shape[1], generator=draw)
    return DataStatistic(inputs.T @ inputs)


def close(found: Tensor, expected: Tensor, promise: str) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=lambda text: f"{promise}: {text}")


def made_delta(form: str, shape: tuple[int, int], seed: int) -> Delta:
    """Return a float32 delta of a form; a sparse one keeps about two fifths."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=draw)
    if form == "Dense":
        return Dense(values)
    if form == "LowRank":
        return LowRank(torch.randn(shape[0], 2, generator=draw), torch.randn(2, shape[1], generator=draw))
    grid = shape if form == "Sparse" else tile_grid(shape, (2, 3))
    count = grid[0] * grid[1]
    kept = torch.randperm(count, generator=draw)[: max(1, 2 * count // 5)].sort().values.to(index_dtype(shape))
    if form == "Sparse":
        return Sparse(kept, values.view(-1)[kept], torch.Size(shape))
    return BlockSparse(kept, gather_tiles(values, kept, (2, 3)), torch.Size(shape))
