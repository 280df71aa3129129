"""Products of inputs with the deltas of their own experts: equal to dense float64 arithmetic, whichever way they go."""

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor

from modular_experts.deltas import BlockSparse, Delta, Dense, LowRank, Sparse
from modular_experts.deltas.tiles import gather_tiles, tile_grid
from modular_experts.native import products as compiled
from modular_experts.routing import Gates, Mixture
from modular_experts.routing.gates import CurrentGates, Segment
from modular_experts.routing.mixture import Entries, Held, add_products

SHAPE = (70, 51)
TILES = {"tiles": (16, 16), "uneven tiles": (10, 20), "large tiles": (32, 32), "rows": (1, 51), "columns": (70, 1)}
FORMS = ["entries", "low rank", "dense", *TILES]


def make(form: str, seed: int, shape: tuple[int, int] = SHAPE) -> Delta:
    """Return a float32 delta whose numbers bfloat16 holds exactly."""
    draw = torch.Generator().manual_seed(seed)
    dense = torch.randn(shape, generator=draw).bfloat16().float()
    if form == "dense":
        return Dense(dense)
    if form == "low rank":
        return LowRank(dense[:, :21].contiguous(), dense[:21].contiguous())
    if form == "entries":
        # The first row keeps nothing and the second one all.
        kept = torch.rand(shape, generator=draw) < 0.2
        kept[0], kept[1] = False, True
        indices = kept.flatten().nonzero()[:, 0].int()
        return Sparse(indices, dense.flatten()[indices], torch.Size(shape))
    units = math.prod(tile_grid(shape, TILES[form]))
    blocks = torch.randperm(units, generator=draw)[: max(1, units // 3)].sort().values.int()
    return BlockSparse(blocks, gather_tiles(dense, blocks, TILES[form]), torch.Size(shape))


def inputs(rows: int, tokens: int, dtype: torch.dtype, shape: tuple[int, int] = SHAPE) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(tokens)
    x, out = (torch.randn(rows, tokens, size, generator=draw).to(dtype) for size in (shape[1], shape[0]))
    return x, out


def by_hand(out: Tensor, x: Tensor, deltas: list[Delta], segments: list[Segment]) -> Tensor:
    """Return what `add_products` does to `out`, in dense float64 arithmetic."""
    total = out.double()
    for expert, places, weights in segments:
        for n, row in enumerate(range(len(x)) if places is None else places.tolist()):
            factor = 1.0 if weights is None else weights[n].item()
            total[row] += factor * (x[row].double() @ deltas[expert].dense().double().T)
    return total


SEGMENTS = [
    Segment(0, torch.tensor([0, 3]), None),
    Segment(1, torch.tensor([2]), torch.tensor([-0.5])),
    Segment(2, torch.tensor([0, 1, 4, 5]), torch.tensor([0.5, 2.0, 0.25, 1.0])),
    Segment(0, None, None),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_products_are_those_of_dense_arithmetic(form: str, dtype: torch.dtype) -> None:
    deltas = [make(form, seed) for seed in range(3)]
    for tokens in (1, 3, 7, 17):
        x, out = inputs(6, tokens, dtype)
        wanted = by_hand(out, x, deltas, SEGMENTS)
        add_products(out, x, [Held(delta, torch.empty(0, dtype=dtype)) for delta in deltas], SEGMENTS)
        allowed = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]
        assert (out - wanted).abs().max() <= allowed * wanted.abs().max()


@pytest.mark.parametrize("form", ["entries", "low rank", "tiles", "columns"])
def test_a_gradient_reaches_the_inputs_and_the_weights(form: str) -> None:
    delta, (x, out) = make(form, 0), inputs(6, 3, torch.float32)
    x.requires_grad_()
    weights = torch.tensor([0.5, 2.0], requires_grad=True)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    segments = [Segment(0, torch.tensor([1, 4]), weights), Segment(0, torch.tensor([2]), None)]
    for segment in segments:
        # Each alone: an output that has a gradient already needs no further test.
        total = out.clone()
        add_products(total, x, [Held(delta, torch.empty(0, dtype=torch.float32))], [segment])
        total.backward(gradient)
    wanted = torch.zeros(x.shape, dtype=torch.float64)
    factors = torch.tensor([0.5, 1.0, 2.0])[:, None, None]
    wanted[[1, 2, 4]] = factors * (gradient[[1, 2, 4]].double() @ delta.dense().double())
    torch.testing.assert_close(x.grad.double(), wanted, rtol=1e-5, atol=1e-4)
    through = (x.detach()[[1, 4]].double() @ delta.dense().double().T * gradient[[1, 4]]).sum((1, 2))
    torch.testing.assert_close(weights.grad.double(), through, rtol=1e-5, atol=1e-4)


def test_inputs_of_no_expert_stay_as_they_are_to_the_bit() -> None:
    for tokens in (1, 20):
        x, out = inputs(6, tokens, torch.bfloat16)
        before = out.clone()
        segments = [Segment(0, torch.tensor([5]), None), Segment(1, torch.tensor([0, 1]), None)]
        add_products(out, x, [Held(make("entries", 0), torch.empty(0, dtype=torch.bfloat16)), None], segments)
        assert torch.equal(out[:5], before[:5])
        assert not torch.equal(out[5], before[5])


def test_rows_that_are_not_as_many_for_each_input_are_refused() -> None:
    """The gates of a pass would else be taken for another pass, and some rows get no expert."""
    if compiled.compiled_products() is None:
        pytest.skip("no C++ compiler makes the products here")
    x, out = inputs(6, 1, torch.float32)
    parts = add_products(out, x, [Held(make("entries", 0), torch.empty(0))], [Segment(0, torch.tensor([5]), None)])
    assert parts is not None
    for rows in (4, 7):
        x, out = inputs(rows, 1, torch.float32)
        with pytest.raises(AssertionError, match=f"{rows} rows are not as many for each of 6 inputs"):
            parts.add_products(out, x)


@pytest.mark.parametrize(("tokens", "shape"), [(1, (300, 400)), (40, SHAPE)])
def test_a_row_has_the_same_bits_whatever_the_other_rows_and_threads(tokens: int, shape: tuple[int, int]) -> None:
    """Rows of few tokens and of many stand beside each other, and one row has several experts."""
    if compiled.compiled_products() is None:
        pytest.skip("no C++ compiler makes the products here")
    x, out = inputs(30, tokens, torch.float32, shape)
    deltas = [Held(make(form, 0, shape), torch.empty(0)) for form in ("entries", "tiles", "low rank", "columns")]
    segments = [Segment(number, torch.tensor([number, 9]), None) for number in range(4)]
    segments.insert(2, Segment(0, torch.arange(10, 30), None))
    for number in range(4):
        alone, together = out.clone(), out.clone()
        add_products(alone, x, deltas, [Segment(number, torch.tensor([number]), None)])
        add_products(together, x, deltas, segments)
        assert torch.equal(alone[number], together[number])
    threads = torch.get_num_threads()
    try:
        for count in (2, 3, 7):
            torch.set_num_threads(count)
            threaded = out.clone()
            add_products(threaded, x, deltas, segments)
            assert torch.equal(together, threaded)
    finally:
        torch.set_num_threads(threads)


def test_passes_with_the_same_gates_are_those_of_the_deltas_at_hand() -> None:
    """What a mixture keeps from one pass to the next is neither of other deltas nor of a copy."""
    current = CurrentGates(Gates(torch.tensor([[0], [1], [1]]), torch.ones(3, 1)))
    deltas, weight = [make("entries", 0), make("low rank", 1)], torch.randn(SHAPE)
    mixture = Mixture(weight, deltas, current)

    def check(one: Mixture, deltas: list[Delta]) -> None:
        assert one.gates.gates is not None
        for tokens in (2, 1, 1, 40):
            x, _ = inputs(3, tokens, torch.float32)
            with torch.no_grad():
                found = one(x, weight, None)
            through_base = (x.double() @ weight.double().T).float()
            wanted = by_hand(through_base, x, deltas, one.gates.gates.segments)
            torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)

    check(mixture, deltas)
    mixture.put(0, make("tiles", 2))
    check(mixture, [make("tiles", 2), deltas[1]])
    twin = copy.deepcopy(mixture)
    mixture.put(0, None)
    check(mixture, [Dense(torch.zeros(SHAPE)), deltas[1]])
    del mixture
    check(twin, [make("tiles", 2), deltas[1]])


@pytest.mark.parametrize(("wide", "dtype"), [(65_536, torch.int16), (65_537, torch.int32)])
def test_columns_take_two_bytes_up_to_65536_of_them(wide: int, dtype: torch.dtype) -> None:
    indices, values = torch.tensor([1, 40_000, wide - 1, 2 * wide + 32_768]).int(), torch.tensor([1.0, 2.0, 3.0, 4.0])
    delta = Sparse(indices, values, torch.Size((3, wide)))
    entries = Entries.of(delta, torch.float32)
    assert entries.columns.dtype == dtype
    for tokens in (1, 20):
        x, out = inputs(1, tokens, torch.float32, (3, wide))
        wanted = by_hand(out, x, [delta], [Segment(0, None, None)])
        torch.testing.assert_close(out.double() + entries.linear(x), wanted, rtol=1e-6, atol=1e-5)
        add_products(out, x, [Held(entries, torch.empty(0, dtype=torch.float32))], [Segment(0, None, None)])
        torch.testing.assert_close(out.double(), wanted, rtol=1e-6, atol=1e-5)


def test_without_a_compiler_torch_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for form in ("entries", "low rank", "tiles"):
        delta, (x, out) = make(form, 0), inputs(6, 3, torch.float32)
        other = out.clone()
        add_products(out, x, [Held(delta, torch.empty(0, dtype=torch.float32))], SEGMENTS[:1])
        with monkeypatch.context() as patch:
            patch.setattr(compiled, "compiled_products", lambda: None)
            add_products(other, x, [Held(delta, torch.empty(0, dtype=torch.float32))], SEGMENTS[:1])
        torch.testing.assert_close(out, other, rtol=1e-5, atol=1e-5)


def test_bfloat16_sums_are_rounded_once_to_even() -> None:
    x = torch.tensor([[[1.0]]]).bfloat16()
    # Beside 256 lie 258 and, half way, 257 and 259: the one goes down and the other up.
    for value, wanted in ((1.0, 256.0), (3.0, 260.0), (math.nan, math.nan), (math.inf, math.inf)):
        out = torch.tensor([[[256.0]]]).bfloat16()
        delta = Sparse(torch.tensor([0]).int(), torch.tensor([value]), torch.Size((1, 1)))
        add_products(out, x, [Held(delta, torch.empty(0, dtype=torch.bfloat16))], [Segment(0, None, None)])
        torch.testing.assert_close(out.item(), wanted, rtol=0, atol=0, equal_nan=True)


def test_a_mixture_follows_its_model_to_another_dtype_and_into_copies() -> None:
    gates = CurrentGates(Gates(torch.tensor([[0], [2], [1]]), torch.ones(3, 1)))
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    deltas = [make(form, 5) for form in ("entries", "low rank", "tiles")]
    x, _ = inputs(3, 4, torch.float32)
    mixture = Mixture(weight, deltas, gates)
    with torch.no_grad():
        found = mixture(x, weight, None)
        for twin in (copy.deepcopy(mixture), pickle.loads(pickle.dumps(mixture))):
            assert torch.equal(twin(x, weight, None), found)
        half = mixture.to(torch.bfloat16)(x.bfloat16(), weight.bfloat16(), None)
    formed = [held.formed.delta for held in mixture.deltas if isinstance(held.formed.delta, Delta)]
    assert {delta.dtype for delta in formed} == {torch.bfloat16}
    assert {held.formed.factor.dtype for held in mixture.deltas} == {torch.bfloat16}
    assert (half - found).abs().max() < 0.03 * found.abs().max()
