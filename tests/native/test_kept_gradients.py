"""The native kernels give the dense gradient's kept units, to float32 accuracy."""

import copy
import math

import pytest
import torch
from testbed.kept_tiles import kept_tiles
from testbed.pairwise import pairwise
from torch import Tensor

from modular_experts.native import kept_gradients as native
from modular_experts.native.kept_gradients import NativeEntries, NativeTiles
from modular_experts.native.kernel import KeptGradient

SHAPES = [(17, 23), (24, 36), (64, 8), (130, 70)]
TOKENS = [1, 7, 300, 1000]
SIZES = [2, 8, 16, 20, 32, 64, 128]


@pytest.fixture(autouse=True)
def compiled() -> None:
    if not native.available():
        pytest.skip("no C++ compiler makes the native kernels here")


def _inputs(shape: tuple[int, int], tokens: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens, shape[1], generator=draw), torch.randn(tokens, shape[0], generator=draw)


def _kernel(size: int, share: float, shape: tuple[int, int]) -> KeptGradient:
    count = -(-shape[0] // size) * -(-shape[1] // size)
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(size))[: max(1, round(share * count))]
    return _kernel_of(chosen.sort().values, size, shape)


def _kernel_of(units: Tensor, size: int, shape: tuple[int, int]) -> KeptGradient:
    return (NativeEntries if size == 1 else NativeTiles)(units, shape, (size, size))


def _check(kernel: KeptGradient, x: Tensor, grad: Tensor) -> None:
    """Compare with the float64 gradient, padded to whole tiles and cut into them."""
    found, dense = kernel.gradient(x, grad), torch.einsum("to,ti->oi", grad.double(), x.double())
    assert found.dtype == torch.float32
    wanted = kept_tiles(dense, kernel.tile, kernel.units.tolist())
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=2e-6 * math.sqrt(x.shape[0]))


@pytest.mark.parametrize(
    ("shape", "tokens", "size", "share"), pairwise(SHAPES, TOKENS, [1, *SIZES], [0.05, 0.5, 1.0]), ids=str
)
def test_the_gradient_is_the_dense_one_at_the_kept_units(shape, tokens, size, share) -> None:
    _check(_kernel(size, share, shape), *_inputs(shape, tokens))


@pytest.mark.parametrize("size", [1, 8, 16, 32])
def test_rows_and_columns_without_units_are_left_out(size) -> None:
    shape = 3 * size, 4 * size
    for units in ([], [0], [5], [0, 11]):
        _check(_kernel_of(torch.tensor(units, dtype=torch.int32), size, shape), *_inputs(shape, 70))


@pytest.mark.parametrize("size", [1, 8, 16, 20, 64])
def test_bfloat16_is_widened_before_it_is_multiplied(size) -> None:
    for shape in ((64, 96), (130, 70)):
        x, grad = _inputs(shape, 300)
        _check(_kernel(size, 0.3, shape), x.bfloat16(), grad.bfloat16())


@pytest.mark.parametrize(("size", "dtype"), list(zip([1, 8, 16, 20], [torch.float32, torch.bfloat16] * 2, strict=True)))
def test_inputs_may_lie_in_memory_in_any_way(size, dtype) -> None:
    x, grad = (matrix.to(dtype) for matrix in _inputs((48, 80), 150))
    kernel, wide = _kernel(size, 0.3, (48, 80)), torch.zeros(150, 200, dtype=dtype)
    wide[:, 3:83] = x
    _check(kernel, x.T.contiguous().T, grad)
    _check(kernel, wide[:, 3:83], grad.repeat_interleave(2, 0)[::2])
    _check(kernel, x[:1].expand(150, 80), grad.flip(1).T.contiguous().T)


@pytest.mark.parametrize("kept_in", [torch.int32, torch.int64])
def test_the_plan_does_not_follow_its_units(kept_in) -> None:
    units = torch.tensor([1, 2, 5], dtype=kept_in)
    kernel, again = _kernel_of(units, 16, (32, 48)), _kernel_of(units.clone(), 16, (32, 48))
    units.fill_(9999)
    x, grad = _inputs((32, 48), 20)
    assert torch.equal(kernel.gradient(x, grad), again.gradient(x, grad))


@pytest.mark.parametrize(("size", "share"), [(1, 0.05), (1, 0.9), (8, 0.9), (16, 0.05), (20, 0.9), (64, 0.05)])
def test_the_number_of_threads_changes_no_bit(size, share) -> None:
    kernel, before = _kernel(size, share, (192, 256)), torch.get_num_threads()
    inputs, found = _inputs((192, 256), 500), {}
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found[threads] = kernel.gradient(*inputs)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[1], found[2])
    assert torch.equal(found[1], found[5])


def test_zeros_lie_beyond_the_edge_even_beside_infinity() -> None:
    x, grad = torch.full((3, 20), math.inf), torch.full((3, 17), math.inf)
    tile = NativeTiles(torch.tensor([3]), (17, 20), (16, 16)).gradient(x, grad)[0]
    assert tile[:1, :4].isinf().all()
    assert tile[1:].eq(0).all()
    assert tile[:, 4:].eq(0).all()


@pytest.mark.parametrize("size", [1, 16])
def test_no_tokens_give_zeros_and_copies_work_like_the_original(size) -> None:
    kernel, inputs = _kernel(size, 0.5, (32, 48)), _inputs((32, 48), 20)
    assert kernel.gradient(*_inputs((32, 48), 0)).eq(0).all()
    assert torch.equal(copy.deepcopy(kernel).gradient(*inputs), kernel.gradient(*inputs))


def test_other_dtypes_are_refused() -> None:
    assert [native.computes(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)] == [True, True, False]
    with pytest.raises(ValueError, match=r"compute in float32 and bfloat16, not in torch.float64"):
        _kernel(16, 0.5, (32, 48)).gradient(torch.ones(2, 48).double(), torch.ones(2, 32).double())
