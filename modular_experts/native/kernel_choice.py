"""Choose the kernel of a support by name, or by a rule from the kind of unit, share kept, device and dtype.

The rule follows the measurements in `docs/benchmarks/step.md`. The Triton kernel for CUDA runs only by name, as nobody
has measured it on a GPU yet.
"""

from collections.abc import Sequence
from math import prod
from typing import Literal, get_args

import torch
from torch import Tensor

import modular_experts.native.kept_gradients as native
from modular_experts.deltas.tiles import Tile
from modular_experts.native.kept_gradients import NativeEntries, NativeTiles
from modular_experts.native.kernel import KeptGradient
from modular_experts.native.plain import KeptColumns, KeptRows, SampledProduct, TileRows
from modular_experts.native.triton_tiles import TritonTiles

Backend = Literal["auto", "dense", "sampled", "block_rows", "slices", "native", "triton"]

SAMPLED_BELOW = 0.07
"""Share of kept entries above which a dense gradient, gathered, is cheaper on a CPU than the sampled product."""

NATIVE_FROM = 2**16
"""Entries of the smallest weight for which the rule compiles and calls native code; smaller ones gain nothing."""


def check_backend(backend: str, shape: Sequence[int], tile: Tile) -> None:
    """Raise `ValueError` if no kernel of this name serves these units."""
    if backend != "auto" and backend not in _serving(shape, tile):
        known = backend in get_args(Backend)
        wrong = f"does not serve units of {tile[0]} x {tile[1]}" if known else "is not known"
        raise ValueError(f"backend={backend!r} {wrong}; use auto, {', '.join(sorted(_serving(shape, tile)))}")


def make_kernel(backend: str, units: Tensor, shape: Sequence[int], tile: Tile, dtype: torch.dtype) -> KeptGradient:
    """Return a kernel planned for these units, as for `KeptGradient`, by its name or, for `auto`, by the rule."""
    check_backend(backend, shape, tile)
    if backend == "auto":
        backend = _rule(units, shape, tile, dtype)
    elif backend in ("native", "sampled", "triton") and (units.device.type == "cpu") == (backend == "triton"):
        place = "a GPU" if backend == "triton" else "a CPU"
        raise ValueError(
            f"backend={backend!r} works on {place} only, and the weight is on {units.device.type}; use auto"
        )
    elif backend == "native" and not native.computes(dtype):
        raise ValueError(f"backend='native' computes in float32 and bfloat16, not in {dtype}; use auto")
    elif backend == "native" and not native.available():
        raise ValueError("backend='native' needs a C++ compiler (g++ or clang++); without one use auto")
    return _serving(shape, tile)[backend](units, shape, tile)


def _rule(units: Tensor, shape: Sequence[int], tile: Tile, dtype: torch.dtype) -> str:
    serving = _serving(shape, tile)
    if "slices" in serving:
        return "slices"
    if units.device.type != "cpu":
        return "dense"
    if prod(shape) >= NATIVE_FROM and native.computes(dtype) and native.available():
        return "native"
    if tile != (1, 1):
        return "block_rows"
    return "sampled" if units.numel() < SAMPLED_BELOW * prod(shape) else "dense"


def _serving(shape: Sequence[int], tile: Tile) -> dict[str, type[KeptGradient]]:
    """Return the kernels that serve a kind of unit, by name."""
    if tile == (1, 1):
        return {"dense": KeptGradient, "native": NativeEntries, "sampled": SampledProduct}
    if tile == (1, shape[1]):
        return {"dense": KeptGradient, "slices": KeptRows}
    if tile == (shape[0], 1):
        return {"dense": KeptGradient, "slices": KeptColumns}
    return {"block_rows": TileRows, "dense": KeptGradient, "native": NativeTiles, "triton": TritonTiles}
