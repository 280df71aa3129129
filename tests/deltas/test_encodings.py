"""Values in few bits: hand-worked codes, bounds on the error, and round trips."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modular_experts.deltas.encodings import ENCODINGS, from_planes, to_planes


def _made(rows: int, count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(0, rows, (count,), generator=generator).sort().values
    return torch.randn(count, generator=generator) * 1e-3, which


def test_int4_by_hand():
    values, rows = torch.tensor([7.0, -3.4, 0.5, 0.0, -2.0, 0.9]), torch.tensor([0, 0, 0, 0, 2, 2])
    encoded = ENCODINGS["int4"].encode(values, rows, 3)
    assert encoded.scales.flatten().tolist() == [1.0, 0.0, torch.tensor(2 / 7).bfloat16().item()]
    assert from_planes(encoded.planes, 6).tolist() == [14, 4, 7, 7, 0, 10]  # 0.5 is halfway and goes to the even number
    third = encoded.scales[2, 0].float().item()
    assert ENCODINGS["int4"].decode(encoded, rows).tolist() == pytest.approx([7, -3, 0, 0, -7 * third, 3 * third])


def test_sign_is_the_mean_size_of_the_row():
    values, rows = torch.tensor([1.0, -3.0, 0.5]), torch.tensor([0, 0, 1])
    encoded = ENCODINGS["sign"].encode(values, rows, 2)
    assert encoded.planes.tolist() == [[0b101]]
    assert ENCODINGS["sign"].decode(encoded, rows).tolist() == [2.0, -2.0, 0.5]


def test_magnitudes_find_the_clusters_of_each_row():
    sizes = torch.tensor([1.0, 2.0, 8.0, 9.0]).repeat(2) * torch.tensor([1.0] * 4 + [0.5] * 4)
    values = sizes * torch.tensor([1, -1] * 4)
    encoded = ENCODINGS["magnitudes2"].encode(values, torch.tensor([0] * 4 + [1] * 4), 2)
    assert encoded.scales.tolist() == [[1.5, 8.5], [0.75, 4.25]]
    # A size between two magnitudes takes the lower.
    values, rows = torch.tensor([0.0, 2.0, 3.0]), torch.tensor([0, 0, 0])
    encoded = ENCODINGS["magnitudes2"].encode(values, rows, 1)
    assert encoded.scales.tolist() == [[1.0, 3.0]]
    assert ENCODINGS["magnitudes2"].decode(encoded, rows).tolist() == [1.0, 1.0, 3.0]


def _k_means(sizes: list[float], cells: int) -> list[float]:
    """Return the magnitudes of one row, by lists: eight rounds from groups of equally many distinct sizes."""
    distinct = sorted(set(sizes))
    found = [[size for size in sizes if distinct.index(size) * cells // len(distinct) == cell] for cell in range(cells)]
    for left in reversed(range(9)):
        means = [sum(cell) / len(cell) if cell else 0.0 for cell in found]
        scales = torch.tensor([max(means[: cell + 1]) for cell in range(cells)]).bfloat16().tolist()
        nearest = [sum(size > (low + high) / 2 for low, high in pairwise(scales)) for size in sizes]
        found = [[size for size, own in zip(sizes, nearest, strict=True) if own == cell] for cell in range(cells)]
        if not left:
            return scales
    raise AssertionError


@given(
    rows=st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=20), min_size=1, max_size=4),
    name=st.sampled_from(["magnitudes2", "magnitudes4"]),
)
def test_magnitudes_are_those_of_k_means_row_by_row(rows, name):
    numbers = torch.tensor([number for number, row in enumerate(rows) for _ in row])
    values, order = torch.tensor([size for row in rows for size in row]).float(), torch.randperm(len(numbers))
    encoded = ENCODINGS[name].encode(-values[order], numbers[order], len(rows))  # the rows of tiles are not in order
    assert encoded.scales.tolist() == [_k_means(list(map(float, row)), ENCODINGS[name].magnitudes) for row in rows]


@pytest.mark.parametrize("name", sorted(ENCODINGS))
def test_bits_and_bytes_and_decoded_values_that_are_encoded_as_themselves(name):
    values, rows = _made(5, 1001)
    encoded = ENCODINGS[name].encode(values, rows, 5)
    assert encoded.planes.shape == (ENCODINGS[name].bits, 126)
    assert encoded.scales.shape == (5, ENCODINGS[name].magnitudes)
    assert (encoded.planes.dtype, encoded.scales.dtype) == (torch.uint8, torch.bfloat16)
    decoded = ENCODINGS[name].decode(encoded, rows)
    again = ENCODINGS[name].decode(ENCODINGS[name].encode(decoded, rows, 5), rows)
    torch.testing.assert_close(again, decoded, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "error"), [("int8", 0.01), ("int4", 0.14), ("magnitudes4", 0.2), ("magnitudes2", 0.36), ("sign", 0.62)]
)
def test_error_of_normal_values(name, error):
    # The best 1-, 2- and 3-bit quantisers of a normal density have relative errors 0.603, 0.343 and 0.186 (Max, 1960).
    values, rows = _made(8, 4000)
    decoded = ENCODINGS[name].decode(ENCODINGS[name].encode(values, rows, 8), rows)
    assert ((decoded - values).norm() / values.norm()).item() < error


@given(bits=st.integers(1, 8), codes=st.lists(st.integers(0, 255), max_size=40))
def test_planes_give_the_codes_back(bits, codes):
    numbers = torch.tensor([code % 2**bits for code in codes], dtype=torch.uint8)
    planes = to_planes(numbers, bits)
    assert planes.shape == (bits, -(-len(codes) // 8))
    assert torch.equal(from_planes(planes, len(codes)), numbers)


@given(name=st.sampled_from(sorted(ENCODINGS)), count=st.integers(0, 60), seed=st.integers(0, 99))
def test_no_value_is_further_than_its_row_allows(name, count, seed):
    values, rows = _made(4, count, seed)
    decoded = ENCODINGS[name].decode(ENCODINGS[name].encode(values, rows, 4), rows)
    assert decoded.dtype == torch.float32
    peaks = values.new_zeros(4).scatter_reduce_(0, rows, values.abs(), "amax")[rows]
    assert bool((decoded.abs() <= peaks * (1 + 2**-8)).all())
    assert bool((decoded * values >= 0).all())


def test_a_row_of_zeros_stays_zero_and_values_that_are_not_finite_are_refused():
    for name, encoding in ENCODINGS.items():
        zeros, rows = torch.zeros(5), torch.tensor([0, 0, 1, 1, 1])
        assert encoding.decode(encoding.encode(zeros, rows, 2), rows).abs().max() == 0, name
    with pytest.raises(ValueError, match="not finite"):
        ENCODINGS["int4"].encode(torch.tensor([1.0, float("nan")]), torch.tensor([0, 0]), 1)
