"""Kept gradients equal the dense gradient at the kept units, whatever the kernel; and the rule that chooses one."""

import pytest
import torch
from testbed.kept_tiles import kept_tiles
from testbed.pairwise import pairwise

from modular_experts.native import kernel_choice as choice
from modular_experts.native.kernel_choice import NATIVE_FROM, SAMPLED_BELOW, check_backend, make_kernel

SHAPES = [(24, 36), (36, 24), (17, 23), (64, 8)]
KINDS = {
    "element": ["sampled", "dense"],
    "block 8": ["block_rows", "dense"],
    "block 16": ["block_rows", "dense"],
    "block 10": ["block_rows", "dense"],
    "row": ["slices", "dense"],
    "column": ["slices", "dense"],
}
CASES = [(kind, backend) for kind, backends in KINDS.items() for backend in backends]


def _tile(kind: str, shape: tuple[int, int]) -> tuple[int, int]:
    side = int(kind.partition(" ")[2] or 1)
    return {"row": (1, shape[1]), "column": (shape[0], 1)}.get(kind, (side, side))


@pytest.mark.parametrize(("shape", "case", "share"), pairwise(SHAPES, CASES, [0.0, 0.02, 0.5, 1.0]), ids=str)
def test_kept_gradient_is_the_dense_one_at_the_kept_units(shape, case, share) -> None:
    kind, backend = case
    draw = torch.Generator().manual_seed(shape[0])
    x = torch.randn(9, shape[1], generator=draw, dtype=torch.float64)
    grad = torch.randn(9, shape[0], generator=draw, dtype=torch.float64)
    tile = _tile(kind, shape)
    count = -(-shape[0] // tile[0]) * -(-shape[1] // tile[1])
    units = torch.randperm(count, generator=draw)[: max(1, int(share * count))].sort().values.to(torch.int32)
    kernel = make_kernel(backend, units, shape, tile, torch.float64)
    assert kernel.name == backend
    found = kernel.gradient(kernel.saved(x), grad)
    wanted = kept_tiles(torch.einsum("to,ti->oi", grad, x), tile, units.tolist())
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kind", "backend"), CASES)
def test_a_layer_that_no_token_reaches_has_a_gradient_of_zero(kind: str, backend: str) -> None:
    kernel = make_kernel(backend, torch.tensor([0, 2]), (24, 36), _tile(kind, (24, 36)), torch.float32)
    gradient = kernel.gradient(kernel.saved(torch.randn(0, 36)), torch.randn(0, 24))
    assert len(gradient) == 2
    assert not gradient.any()


def test_columns_save_only_their_part_of_the_input() -> None:
    kernel = make_kernel("auto", torch.tensor([1, 4]), (6, 5), (6, 1), torch.float32)
    assert kernel.saved(torch.randn(7, 5)).shape == (7, 2)


@pytest.mark.parametrize(
    ("tile", "kept", "dtype", "native", "wanted"),
    [
        ((1, 512), 2, torch.float32, True, "slices"),
        ((512, 1), 2, torch.float64, True, "slices"),
        ((1, 1), 100, torch.float32, True, "native"),
        ((1, 1), 100, torch.bfloat16, True, "native"),
        ((1, 1), 100, torch.float64, True, "sampled"),
        ((1, 1), 100, torch.float32, False, "sampled"),
        ((1, 1), int(SAMPLED_BELOW * 512 * 512) + 1, torch.float32, False, "dense"),
        ((16, 16), 100, torch.float32, True, "native"),
        ((16, 16), 100, torch.float32, False, "block_rows"),
    ],
)
def test_the_rule_is_the_documented_one(monkeypatch, tile, kept, dtype, native, wanted) -> None:
    monkeypatch.setattr(choice.native, "available", lambda: native)
    units = torch.arange(kept)
    assert make_kernel("auto", units, (512, 512), tile, dtype).name == wanted


def test_small_weights_never_compile(monkeypatch) -> None:
    def fail() -> bool:
        raise AssertionError("asked for a compiler")

    monkeypatch.setattr(choice.native, "available", fail)
    side = int(NATIVE_FROM**0.5) - 1
    assert make_kernel("auto", torch.arange(9), (side, side), (1, 1), torch.float32).name == "sampled"


@pytest.mark.parametrize(
    ("backend", "tile", "sentence"),
    [
        (
            "sampled",
            (16, 16),
            "backend='sampled' does not serve units of 16 x 16; use auto, block_rows, dense, native, t",
        ),
        ("block_rows", (1, 1), "backend='block_rows' does not serve units of 1 x 1; use auto, dense, native, sampled"),
        ("native", (1, 32), "use auto, dense, slices"),
        ("nativ", (1, 1), "backend='nativ' is not known; use auto, dense, native, sampled"),
    ],
)
def test_a_backend_that_cannot_serve_is_refused(backend, tile, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        check_backend(backend, (32, 32), tile)
