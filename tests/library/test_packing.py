"""Encoding: what is kept comes back exactly from the fewest bytes, and bytes that no encoder wrote are refused.

Gaps and masks are made here once more, number by number in plain Python.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modular_experts.library.packing import decode, encode, fits

NOTABLE = [1, 2, 253, 254, 255, 256, 257, 509, 510, 511, 512, 765, 766, 70_000]


def gaps_of(numbers):
    found, before = [], -1
    for number in numbers:
        distance, before = number - before, number
        while distance > 255:
            found.append(0)
            distance -= 255
        found.append(distance)
    return found


def mask_of(numbers, limit):
    return list(sum(1 << number for number in numbers).to_bytes(-(-limit // 8), "little"))


def read(name, content, count, limit, dtype=torch.int32):
    assert fits(name, (len(content),), count, limit)
    return decode(name, torch.tensor(content, dtype=torch.uint8), count, limit, dtype)


def numbers_of(distances):
    return (torch.tensor(distances, dtype=torch.int64).cumsum(0) - 1).tolist()


kept = st.tuples(
    st.lists(st.sampled_from(NOTABLE) | st.integers(1, 3000), max_size=40).map(numbers_of), st.integers(0, 9)
)
crowded = st.tuples(st.lists(st.integers(1, 4), max_size=200).map(numbers_of), st.integers(0, 9))


@given(kept | crowded, st.sampled_from([torch.int32, torch.int64]))
@example((numbers_of(NOTABLE), 0), torch.int32)
@example(([], 0), torch.int32)
@example(([], 9), torch.int32)
@example((list(range(64)), 0), torch.int32)
@example((list(range(65)), 0), torch.int64)
@example(([0], 0), torch.int32)
@example(([0], 9), torch.int32)
@settings(max_examples=80)
def test_kept_numbers_come_back_from_the_fewest_bytes(found, dtype):
    numbers, room = found
    limit = (numbers[-1] + 1 if numbers else 0) + room
    ways = {"gaps": gaps_of(numbers), "mask": mask_of(numbers, limit)}
    for name, content in ways.items():
        back = read(name, content, len(numbers), limit, dtype)
        assert back.dtype == dtype
        assert back.tolist() == numbers
    sizes = {"blocks": len(numbers) * dtype.itemsize} | {name: len(content) for name, content in ways.items()}
    ((name, stored),) = encode(torch.tensor(numbers, dtype=dtype), limit, "blocks").items()
    assert sizes[name] == min(sizes.values()) == stored.numel() * stored.element_size()
    assert stored.tolist() == {"blocks": numbers, **ways}[name]
    assert decode(name, stored, len(numbers), limit, dtype).tolist() == numbers


@pytest.mark.parametrize("share", [0.2, 0.97])
def test_a_mask_of_several_parts_comes_back(share):
    numbers = (torch.rand(600_001, generator=torch.Generator().manual_seed(0)) < share).nonzero().view(-1).int()
    numbers = torch.cat([numbers[numbers < 600_000], numbers.new_tensor([600_000])])
    found = encode(numbers, 600_001, "indices")
    assert torch.equal(decode("mask", found["mask"], len(numbers), 600_001, torch.int32), numbers)


def test_the_shortest_is_chosen_and_of_equals_the_quickest():
    for numbers, limit, name in [
        ([900], 10**6, "indices"),  # three times 255 further and then some: four bytes, like the number itself
        ([3, 10**5], 10**6, "indices"),
        ([3, 500], 10**6, "gaps"),
        ([7], 8, "gaps"),  # a byte, like the mask
        ([6, 7], 8, "mask"),
        ([], 8, "indices"),
    ]:
        assert list(encode(torch.tensor(numbers, dtype=torch.int32), limit, "indices")) == [name]


def test_numbers_that_are_not_kept_ones_are_not_encoded():
    for numbers in ([1, 1], [2, 1], [-1, 1], [-5], [0, 10], [10], [2**31 - 1], [-(2**31), 5]):
        with pytest.raises(ValueError, match=r"its blocks are not sorted and unique numbers in \[0, 10\)"):
            encode(torch.tensor(numbers, dtype=torch.int32), 10, "blocks")


@pytest.mark.parametrize(
    ("name", "content", "count", "limit", "sentence"),
    [
        ("gaps", [1, 0], 2, 1000, r"its gaps cannot stand for 2 numbers in \[0, 1000\)$"),
        ("gaps", [0, 1], 2, 1000, r"its gaps cannot stand for 2 numbers in \[0, 1000\)$"),
        ("gaps", [1, 1, 0], 2, 1000, r"its gaps cannot stand for 2 numbers in \[0, 1000\)$"),
        ("gaps", [1, 0, 7], 2, 262, r"its gaps cannot stand for 2 numbers in \[0, 262\), as the last would be 262"),
        ("gaps", [12], 1, 11, r"its gaps cannot stand for 1 numbers in \[0, 11\), as the last would be 11"),
        ("mask", [0b111], 2, 8, r"its mask cannot stand for 2 numbers in \[0, 8\)$"),
        ("mask", [0b111], 4, 8, r"its mask cannot stand for 4 numbers in \[0, 8\)$"),
        ("mask", [0, 0b100], 1, 10, r"its mask cannot stand for 1 numbers in \[0, 10\), as the last would be 10"),
    ],
)
def test_bytes_that_no_encoder_wrote_are_refused(name, content, count, limit, sentence, monkeypatch):
    monkeypatch.setattr("torch.empty", torch.zeros)  # so that no number that is there by chance is refused
    with pytest.raises(ValueError, match=sentence):
        read(name, content, count, limit)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["compiled", "PyTorch"])
def test_gaps_that_overflow_are_refused(dtype):
    gaps = torch.full((2**32 // 255 + 1,), 255, dtype=torch.uint8)  # in 32 bits they add up to less than 256
    with pytest.raises(ValueError, match=r"as the last would be 42949\d{5}"):
        decode("gaps", gaps, len(gaps), 2**31 - 1, dtype)


def test_a_size_that_cannot_be_is_refused_before_anything_is_read():
    for name, shape, count, limit in [
        ("gaps", (4,), 5, 100),
        ("gaps", (7,), 5, 300),
        ("gaps", (5, 1), 5, 100),
        ("mask", (12,), 5, 100),
        ("mask", (14,), 5, 100),
        ("mask", (1,), 9, 8),
        ("indices", (4,), 5, 100),
        ("indices", (5,), 5, 4),
    ]:
        assert not fits(name, shape, count, limit), (name, shape)
