"""Cut an expert's deltas to fewer directions or entries, and say how their values are stored."""

from dataclasses import dataclass, replace

from modular_experts.deltas import BlockSparse, Delta, Dense, LowRank, Sparse
from modular_experts.deltas.algebra import truncated_svd
from modular_experts.deltas.encodings import ENCODINGS
from modular_experts.deltas.tiles import index_dtype, kept_count
from modular_experts.library.encoded import check_encoding
from modular_experts.library.packing import pack, unpack
from modular_experts.masks import top_k


@dataclass(frozen=True)
class Form:
    """A way to store an expert in fewer bytes.

    Attributes:
        encoding: How values are stored; a name of `VALUE_TYPES`.
        keep: Share of the entries or tiles of each sparse delta that stay, the largest ones, in (0, 1].
        rank: The most directions of each low-rank or dense matrix; None leaves all, and a dense delta dense.
    """

    encoding: str = "float32"
    keep: float = 1.0
    rank: int | None = None

    def __post_init__(self) -> None:
        check_encoding(self.encoding)
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep={self.keep} must be in (0, 1], the share of the entries that stay")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank={self.rank} must be at least 1")

    def cut(self, delta: Delta) -> Delta:
        """Return the delta with the directions, entries or tiles that stay, before its values are encoded."""
        rank = delta.rank if isinstance(delta, LowRank) else min(delta.shape, default=0)
        is_matrix = isinstance(delta, LowRank) or (isinstance(delta, Dense) and len(delta.shape) == 2)
        if self.rank is not None and self.rank < rank and is_matrix:
            cut = truncated_svd(delta, self.rank)[0]
            # Both factors get the same size of each direction, so that they lose alike.
            sizes = (cut.up.norm(dim=0) / cut.down.norm(dim=1).clamp(min=1e-30)).sqrt().clamp(min=1e-15)
            return LowRank(cut.up / sizes, cut.down * sizes[:, None])
        if isinstance(delta, Dense):
            return self._sparse(delta)
        if self.keep == 1 or not isinstance(delta, Sparse | BlockSparse) or delta.is_empty:
            return delta
        sizes = delta.values.abs() if isinstance(delta, Sparse) else delta.values.square().sum((1, 2))
        kept = top_k(sizes, kept_count(self.keep, len(sizes))).sort().values.long()
        if isinstance(delta, Sparse):
            return replace(delta, indices=delta.indices[kept], values=delta.values[kept])
        return replace(delta, blocks=delta.blocks[kept], values=delta.values[kept])

    def _sparse(self, delta: Dense) -> Delta:
        """Return a dense delta as a sparse one, which is equal, if that takes fewer bytes."""
        values = delta.values.reshape(-1)
        kept = int(values.count_nonzero())
        size = values.numel()
        bits = ENCODINGS[self.encoding].bits if self.encoding in ENCODINGS else 32 >> (self.encoding == "bfloat16")
        if kept * bits + min(8 * kept, size) >= size * bits:  # a byte for the place of a value, or a bit an entry
            return delta
        indices = values.nonzero()[:, 0]
        return Sparse(indices.to(index_dtype(delta.shape)), values[indices], delta.shape)

    def read(self, cut: Delta) -> Delta:
        """Return what a reader gets of a delta that `cut` returned and a file holds."""
        packed, values = pack(cut, self.encoding)
        return unpack(values, packed)

    def __str__(self) -> str:
        rank = f"rank {self.rank}, " if self.rank is not None else ""
        return f"{rank}{self.encoding}" + (f", {self.keep:.0%} of the entries" if self.keep < 1 else "")
