"""Deltas of every form, drawn at random: what the tests of deltas, merging and the library are run on."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from hypothesis import strategies as st

from modular_experts.base.files import fingerprint
from modular_experts.deltas import BlockSparse, Delta, Dense, LowRank, Sparse, TaskVector
from modular_experts.deltas.tiles import Tile, gather_tiles, index_dtype, tile_grid
from modular_experts.library import make_record, write_expert

FORMS = ["Dense", "LowRank", "Sparse", "BlockSparse", "zero"]


class Held(TaskVector):
    """Deltas in memory as a task vector, which counts how often they are asked for."""

    def __init__(self, deltas: Mapping[str, Delta]) -> None:
        self.held, self.asked = dict(deltas), 0

    def shapes(self) -> dict[str, torch.Size]:
        return {name: self.held[name].shape for name in sorted(self.held)}

    def __getitem__(self, name: str) -> Delta:
        self.asked += 1
        return self.held[name]


def random_delta(
    form: str,
    shape: Sequence[int],
    seed: int,
    dtype: torch.dtype = torch.float64,
    share: float = 0.4,
    tile: Tile = (3, 3),
) -> Delta:
    """Return a delta of a form; a sparse one keeps about `share` of the entries or of the tiles."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)
    if form == "zero":
        return Sparse.zero(shape)
    if form == "Dense":
        return Dense(values)
    if form == "LowRank":
        rank = 1 + seed % 2
        return LowRank(*(torch.randn(*s, generator=draw, dtype=torch.float64).to(dtype) for s in _factors(shape, rank)))
    if form == "Sparse":
        indices = _some(math.prod(shape), share, draw)
        return Sparse(indices.to(index_dtype(shape)), values.view(-1)[indices], torch.Size(shape))
    blocks = _some(math.prod(tile_grid(shape, tile)), share, draw).to(index_dtype(shape))
    return BlockSparse(blocks, gather_tiles(values, blocks, tile), torch.Size(shape))


def write_random(path: Path, base: Path, weights: Mapping[str, Sequence[int]], seed: int, tasks: Sequence[str]) -> None:
    """Write an expert of sparse deltas of weights with the given shapes; another seed gives other values and places."""
    facts = {"id": str(base), "revision": None, "fingerprint": fingerprint(base)}
    deltas = {name: random_delta("Sparse", shape, seed, torch.float32, share=0.3) for name, shape in weights.items()}
    write_expert(path, deltas, make_record("SparseExpert", facts, tasks=tasks), overwrite=True)


def same(one: Delta, other: Delta) -> bool:
    """Return whether two deltas have the same form and the same tensors, bit for bit."""
    tensors, others = one.tensors(), other.tensors()
    return type(one) is type(other) and all(torch.equal(tensors[name], others[name]) for name in tensors)


def _factors(shape: Sequence[int], rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (shape[0], rank), (rank, shape[1])


def _some(count: int, share: float, draw: torch.Generator) -> torch.Tensor:
    return torch.randperm(count, generator=draw)[: max(1, round(share * count))].sort().values


shapes = st.tuples(st.integers(1, 9), st.integers(1, 9))
forms = st.sampled_from(FORMS)
seeds = st.integers(0, 2**16)


@st.composite
def deltas_of_one_weight(draw: st.DrawFn, least: int = 1, most: int = 4, of: Sequence[str] = FORMS) -> list[Delta]:
    """Return several deltas of one shape in any mix of forms."""
    shape = draw(shapes)
    chosen = draw(st.lists(st.sampled_from(list(of)), min_size=least, max_size=most))
    tiles = st.sampled_from([(2, 2), (3, 3), (1, shape[1]), (shape[0], 1)])
    return [random_delta(form, shape, draw(seeds), tile=draw(tiles)) for form in chosen]
