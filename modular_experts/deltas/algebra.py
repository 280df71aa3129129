"""Take inner products, scale rows, and find the first singular vector or the nearest delta of a rank.

Inner products are computed entry by entry in float64, because the norms of sums lose every digit where two deltas are
nearly orthogonal or of very different length.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from modular_experts.deltas.forms import BlockSparse, Delta, Dense, LowRank, Sparse
from modular_experts.deltas.tiles import gather_tiles, rows_and_columns, tile_grid


def inner(one: Delta, other: Delta) -> float:
    """Return the sum of the products of the entries of two deltas of one weight."""
    return inner_by_row(one, other).sum().item()


def inner_by_row(first: Delta, other: Delta) -> Tensor:
    """Return the inner product of each row with the same row of the other delta, float64 `(rows,)`.

    A weight of one dimension has one row.
    """
    first = first.by_entries()
    other = other.by_entries()
    # The cheapest form comes first: sparse, then low-rank, then dense.
    if isinstance(other, Sparse) or not isinstance(first, Sparse | LowRank):
        first, other = other, first
    if isinstance(first, Sparse):
        rows = _row_count(first.shape)
        indices = first.indices.long()
        products = first.values.double() * _values_at(other, indices)
        total = torch.zeros(rows, dtype=torch.float64, device=first.device)
        return total.index_add_(0, indices // (first.shape.numel() // rows), products)
    if isinstance(first, LowRank):
        # Row sums of `(other @ down.T) * up`; two low-rank deltas meet in the product of their ranks.
        up = first.up.double()
        down = first.down.double()
        if isinstance(other, LowRank):
            across = other.up.double() @ (other.down.double() @ down.T)
        else:
            across = _matrix(other) @ down.T
        return (across * up).sum(1)
    return torch.linalg.vecdot(_matrix(first), _matrix(other))


def scale_rows(delta: Delta, factors: Tensor) -> Delta:
    """Multiply each row of a delta by its factor `(rows,)`, in at least float32; one factor is for the whole weight."""
    factors = factors.to(delta.device, torch.promote_types(delta.dtype, torch.float32))
    if len(factors) == 1:
        return delta.to(dtype=factors.dtype) * factors[0]
    if isinstance(delta, Sparse):
        of_entries = factors.repeat_interleave(delta.row_ends.diff(), output_size=delta.values.numel())
        return replace(delta, values=delta.values * of_entries)
    if isinstance(delta, BlockSparse):
        tall = tile_grid(delta.shape, delta.tile)[0]
        height = delta.tile[0]
        padded = F.pad(factors, (0, tall * height - len(factors))).view(-1, height)
        rows = rows_and_columns(delta.blocks, tile_grid(delta.shape, delta.tile))[0]
        return replace(delta, values=delta.values * padded[rows][:, :, None])
    if isinstance(delta, LowRank):
        return replace(delta, up=delta.up * factors[:, None])
    return Dense((delta.values.reshape(len(factors), -1) * factors[:, None]).view(delta.shape))


def dot(tensor: Tensor, delta: Delta) -> Tensor:
    """Return the inner product of a tensor `(out, in)` and a delta in its own form, in at least float32."""
    wide = torch.promote_types(tensor.dtype, delta.dtype)
    if isinstance(delta, Sparse):
        # Reads int32 indices as they are; `tensor[indices]` would widen them first.
        return tensor.reshape(-1).index_select(0, delta.indices).to(wide).dot(delta.values.to(wide))
    if isinstance(delta, BlockSparse):
        return (gather_tiles(tensor.contiguous(), delta.blocks, delta.tile).to(wide) * delta.values).sum()
    if isinstance(delta, LowRank):
        return (tensor.to(wide) @ delta.down.to(wide).T * delta.up).sum()
    return tensor.to(wide).reshape(-1).dot(delta.values.to(wide).reshape(-1))


def dot_by_row(tensor: Tensor, delta: Delta) -> Tensor:
    """Return the inner products of the rows of a tensor `(out, in)` and a delta: `(out,)`, in at least float32."""
    wide = torch.promote_types(torch.promote_types(tensor.dtype, delta.dtype), torch.float32)
    tensor = tensor.to(wide)
    rows = delta.shape[0] if delta.shape else 1
    if isinstance(delta, Sparse):
        # One pass gathers, multiplies and sums each row; it takes little longer than one inner product of them all.
        table = tensor.reshape(-1, 1)
        factors = delta.values.to(wide)
        summed = F.embedding_bag(delta.indices, table, delta.row_ends[:-1], mode="sum", per_sample_weights=factors)
        return summed.view(-1)
    if isinstance(delta, BlockSparse):
        of_tiles = (gather_tiles(tensor.contiguous(), delta.blocks, delta.tile) * delta.values).sum(2)
        grid = tile_grid(delta.shape, delta.tile)
        summed = of_tiles.new_zeros(grid[0], delta.tile[0])
        return summed.index_add_(0, rows_and_columns(delta.blocks, grid)[0], of_tiles).view(-1)[:rows]
    if isinstance(delta, LowRank):
        return (tensor @ delta.down.to(wide).T * delta.up).sum(1)
    return (tensor * delta.values).reshape(rows, -1).sum(1)


def _row_count(shape: Sequence[int]) -> int:
    return shape[0] if len(shape) > 1 else 1


def _matrix(delta: Delta) -> Tensor:
    values = delta.values if isinstance(delta, Dense) else delta.dense()  # the values of a dense delta need no copy
    return values.double().reshape(_row_count(delta.shape), -1)


def _values_at(delta: Delta, indices: Tensor) -> Tensor:
    """Return the values at flat entries, zero where the delta keeps nothing."""
    if isinstance(delta, LowRank):
        rows = indices // delta.shape[1]
        columns = indices % delta.shape[1]
        values = torch.zeros(indices.numel(), dtype=torch.float64, device=indices.device)
        # One rank at a time, so that no matrix of (entries, rank) is made.
        for up, down in zip(delta.up.double().T, delta.down.double(), strict=True):
            values += up[rows] * down[columns]
        return values
    if isinstance(delta, Sparse):
        if delta.is_empty:
            return torch.zeros(indices.numel(), dtype=torch.float64, device=indices.device)
        kept = delta.indices.long()
        place = torch.searchsorted(kept, indices).clamp_(max=kept.numel() - 1)
        return torch.where(kept[place] == indices, delta.values[place].double(), 0.0)
    return delta.dense().reshape(-1)[indices].double()


def truncated_svd(delta: Delta, rank: int) -> tuple[LowRank, float]:
    """Return the nearest delta of a rank of at least 1, in float32, and the squared Frobenius norm of the rest.

    A delta whose factors have that rank or less loses nothing. The singular vectors are eigenvectors of the smaller
    Gram matrix, in float64, which takes a fraction of the time of a full decomposition.
    """
    if isinstance(delta, LowRank) and delta.rank <= rank:
        return LowRank(delta.up.float(), delta.down.float()), 0.0
    if isinstance(delta, LowRank):
        # The orthonormal basis changes no singular value, so only the small core is decomposed.
        basis, core = torch.linalg.qr(delta.up.double())
        matrix = core @ delta.down.double()
        turned = False
    else:
        matrix = delta.dense().double()
        turned = matrix.shape[0] > matrix.shape[1]
        basis = None
        matrix = matrix.T if turned else matrix
    energies, directions = torch.linalg.eigh(matrix @ matrix.T)  # in ascending order
    left = directions[:, -rank:].flip(1)
    right = left.T @ matrix
    lost = energies[:-rank].clamp(min=0).sum().item()
    if basis is not None:
        left = basis @ left
    up, down = (right.T, left.T) if turned else (left, right)
    return LowRank(up.float().contiguous(), down.float().contiguous()), lost


# On experts of SmolLM2-135M (the second singular value is 0.14 to 0.98 of the first), a block of 4 takes 4 to 8 steps.
# Random entries of a (6144, 2048) weight, whose first singular values lie within 1 %, take 61.
_BLOCK = 4
_STEPS = 300
_CLOSE = 1e-8


def top_direction(delta: Delta) -> tuple[Tensor, float]:
    """Return the right singular vector v `(in,)` of the largest singular value s, float64, and s.

    The sign of v is arbitrary. It is the first eigenvector of `d^T d`, found from a fixed start by LOBPCG (Knyazev
    2001): a step takes the best vectors (Rayleigh-Ritz) of the span of a block, of its residuals and of the block
    before, until `|d^T d v - s^2 v|` is at most `_CLOSE` times `s^2`. A delta that takes too many is decomposed.
    One that moves nothing gives zeros.
    """
    wide = delta.to(dtype=torch.float64)
    back = wide.T
    size = delta.shape[1]
    start = torch.randn(size, min(_BLOCK, size), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    span = start.to(delta.device)
    before = span[:, :0]
    for _ in range(_STEPS):
        basis = torch.linalg.qr(span).Q
        image = back.linear(wide.linear(basis.T)).T
        squares, turns = (part[..., -_BLOCK:] for part in torch.linalg.eigh(basis.T @ image))
        block = basis @ turns
        square = squares[-1]
        if square <= 0:
            return torch.zeros_like(block[:, -1]), 0.0
        residuals = image @ turns - squares * block
        if residuals[:, -1].norm() <= _CLOSE * square:
            return block[:, -1], square.sqrt().item()
        span = torch.cat([block, residuals, before], 1)
        before = block
    _, values, rows = torch.linalg.svd(wide.dense(), full_matrices=False)
    return rows[0], values[0].item()
