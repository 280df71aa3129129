"""Compute the gradient of only the kept square tiles by a Triton program, on the matrix units of a GPU.

Reading takes most of the time: a 16-bit tile of side `s` that is made alone does `s / 2` FLOP per byte, where an H100
could do over a hundred. So narrow tiles of one row, a segment, are made together: the row's piece of the output
gradient stays on the chip while the inputs of `n` tiles pass by, `s n / (n + 1)` FLOP per byte. The gathered inputs are
the tall side of the product, because the instructions of Hopper want 64 rows. Where there are fewer segments than the
GPU has room for, tokens are split too, and one sum over the splits follows.

It gives the right numbers in Triton's interpreter and compiles for compute capability 8.0 and 9.0, but it has not run
on a GPU: these reasons are arithmetic. Triton is imported when the first gradient is planned.
"""

# Triton knows its constants by the text of their annotations.
from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from modular_experts.deltas.tiles import Tile, tile_grid
from modular_experts.native.kernel import KeptGradient, contiguous_rows

if TYPE_CHECKING:
    import triton.language as tl


SIZES = (8, 16, 32, 64, 128)
"""Sides of a tile that it serves. A program's rows must be a power of two; 8 reads memory in pieces of 16 bytes."""

SEGMENT_COLUMNS = 256
"""Most input columns of one program of narrow tiles: its sums, 256 x 32 at most, still lie in the registers."""

PROGRAMS_PER_PROCESSOR = 4
"""Programs that find room on one multiprocessor at a time, by their shared memory; with fewer, tokens are split."""

TOKENS_PER_SPLIT = 256
"""Fewest tokens of a split: writing a 16-bit tile's partial sum is then an eighth of its reading at 16, half at 128."""

BUFFER_BYTES = 2**25
"""Most memory for the partial sums of one weight."""


class TritonTiles(KeptGradient):
    """One program for each segment of a row of tiles and each split of the tokens.

    It takes float32, bfloat16 and float16, sums in float32 and returns float32. Products of float32 inputs are exact
    float32 unless `torch.backends.cuda.matmul.fp32_precision` is `tf32`.
    """

    name: ClassVar[str] = "triton"

    def __init__(self, units: Tensor, shape: Sequence[int], tile: Tile) -> None:
        super().__init__(units, shape, tile)
        if tile[0] != tile[1] or tile[0] not in SIZES:
            sizes = f"{', '.join(map(str, SIZES[:-1]))} or {SIZES[-1]}"
            raise ValueError(
                f"backend='triton' serves square tiles of {sizes}, not {tile[0]} x {tile[1]}; set block_size, or use "
                "auto"
            )
        program()  # raises now, rather than in the first backward pass, where Triton is missing
        wide = tile_grid(shape, tile)[1]
        rows, counts = torch.unique_consecutive(units.long() // wide, return_counts=True)
        # A program has room for a power of two of tiles, at most for the tiles of the fullest row.
        fullest = int(counts.max()) if counts.numel() else 1
        most = SEGMENT_COLUMNS // tile[0] if tile[0] < 64 else 1
        self.tiles = min(max(1 << (fullest - 1).bit_length(), 64 // tile[0]), most)
        self.segments = _segments(rows, counts, self.tiles)
        self.columns = (units.long() % wide).to(torch.int32)

    def splits(self, tokens: int) -> int:
        kept_bytes = 4 * self.units.numel() * self.tile[0] ** 2
        device = self.units.device
        # Outside of a GPU, in the interpreter, one processor runs the program.
        processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        return token_splits(len(self.segments), tokens, kept_bytes, processors)

    def gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"backend='triton' computes in float32, bfloat16 and float16, not in {x.dtype}; use auto")
        kept = self.units.numel()
        chunk = 64 // x.element_size()
        # Each split has a whole number of chunks, and at least one.
        split_tokens = max(1, -(-x.shape[0] // (self.splits(x.shape[0]) * chunk))) * chunk
        splits = max(1, -(-x.shape[0] // split_tokens))
        partials = torch.empty(splits, kept, *self.tile, dtype=torch.float32, device=x.device)
        if kept:
            self._launch(x, grad, partials, split_tokens, chunk)
        return partials[0] if splits == 1 else partials.sum(0)

    def _launch(self, x: Tensor, grad: Tensor, partials: Tensor, split_tokens: int, chunk: int) -> None:
        size = self.tile[0]
        x = contiguous_rows(x)
        grad = contiguous_rows(grad)
        with torch.cuda.device_of(x):  # Triton launches on the current device, whichever holds its arguments
            program()[(len(self.segments), partials.shape[0])](
                *(x, grad, partials, self.segments, self.columns),
                *(x.shape[0], split_tokens, self.shape[1], self.shape[0], partials.shape[1]),
                *(x.stride(0), grad.stride(0)),
                size=size,
                tiles=self.tiles,
                chunk=chunk,
                precision="tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
                widened=interpreted(),
                num_warps=8 if self.tiles * size * size > 8192 else 4,
                num_stages=3,
                enable_fp_fusion=True,  # Triton 3.9 warns where this is left to its default, which will change
            )


def token_splits(segments: int, tokens: int, kept_bytes: int, processors: int) -> int:
    """Return into how many parts to split the tokens, so that there is work for every multiprocessor of a GPU.

    `segments` is the number of programs without a split, and `kept_bytes` the memory of each part's sums.
    """
    wanted = -(-PROGRAMS_PER_PROCESSOR * processors // max(1, segments))
    return max(1, min(wanted, tokens // TOKENS_PER_SPLIT, BUFFER_BYTES // max(1, kept_bytes)))


def _segments(rows: Tensor, counts: Tensor, tiles: int) -> Tensor:
    """Return the segments `(n, 3)`: row of tiles, first slot, last slot + 1; all of a row are about as long."""
    pieces = -(-counts // tiles)
    piece = torch.arange(int(pieces.sum()), device=rows.device) - (pieces.cumsum(0) - pieces).repeat_interleave(pieces)
    first = (counts.cumsum(0) - counts).repeat_interleave(pieces)
    count = counts.repeat_interleave(pieces)
    total = pieces.repeat_interleave(pieces)
    starts = first + piece * count // total
    ends = first + (piece + 1) * count // total
    return torch.stack([rows.repeat_interleave(pieces), starts, ends], dim=1).to(torch.int32)


@functools.cache
def program() -> Any:
    """Import Triton and return the program, to be compiled at its first launch."""
    global tl  # Triton looks the name up among the globals of the function that it compiles
    try:
        import triton
        import triton.language as tl
    except ImportError as error:
        raise ValueError("backend='triton' needs the package triton: pip install triton, or use auto") from error
    # A new number of tokens must not compile the program again.
    return triton.jit(_segment_product, do_not_specialize=["tokens", "split_tokens"])


@functools.cache
def interpreted() -> bool:
    """Return whether the program runs in Triton's interpreter, on the CPU: `TRITON_INTERPRET=1`."""
    import triton

    return not isinstance(program(), triton.JITFunction)


def _segment_product(
    x,
    grad,
    partials,
    segments,
    columns,
    tokens,
    split_tokens,
    inputs,
    outputs,
    slots,
    x_stride,
    grad_stride,
    size: tl.constexpr,
    tiles: tl.constexpr,
    chunk: tl.constexpr,
    precision: tl.constexpr,
    widened: tl.constexpr,
):
    """Write the tiles of one segment, summed over one split of the tokens."""
    segment = tl.program_id(0)
    split = tl.program_id(1)
    row = tl.load(segments + 3 * segment)
    start = tl.load(segments + 3 * segment + 1)
    end = tl.load(segments + 3 * segment + 2)

    # The columns of the kept tiles side by side; without the hints the compiler would read them one value at a time.
    wide = tl.arange(0, tiles * size)
    slot = start + wide // size
    kept = slot < end
    column = tl.load(columns + slot, mask=kept, other=0) * size + wide % size
    column = tl.max_contiguous(tl.multiple_of(column, size), size)
    output = row * size + tl.arange(0, size)
    x_kept = kept & (column < inputs)
    grad_kept = output < outputs

    # Tokens times stride outgrows 32 bits, so pointers move; a chunk's offsets do not.
    step = tl.arange(0, chunk)
    first = split * split_tokens
    last = tl.minimum(first + split_tokens, tokens)
    x += first.to(tl.int64) * x_stride
    grad += first.to(tl.int64) * grad_stride
    x_offsets = column[:, None] + step[None, :] * x_stride
    grad_offsets = step[:, None] * grad_stride + output[None, :]
    sums = tl.zeros((tiles * size, size), tl.float32)
    for token in range(first, last, chunk):
        inside = token + step < last
        x_part = tl.load(x + x_offsets, mask=x_kept[:, None] & inside[None, :], other=0.0)
        grad_part = tl.load(grad + grad_offsets, mask=inside[:, None] & grad_kept[None, :], other=0.0)
        if widened:  # Triton's interpreter would multiply the bits of bfloat16 as if they were integers
            x_part = x_part.to(tl.float32)
            grad_part = grad_part.to(tl.float32)
        sums = tl.dot(x_part, grad_part, sums, input_precision=precision)
        x += chunk * x_stride
        grad += chunk * grad_stride

    place = (split.to(tl.int64) * slots + slot) * (size * size) + wide % size
    tl.store(partials + place[:, None] + tl.arange(0, size)[None, :] * size, sums, mask=kept[:, None])
