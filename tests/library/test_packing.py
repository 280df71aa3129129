"""Kept entries and tiles come back from their shortest bytes, also in a file, and forged bytes are refused."""

import json
import math
import struct

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import safe_open
from testbed.random_deltas import random_delta, same
from testbed.stored_by_hand import as_it_is, write_by_hand

from modular_experts.deltas import BlockSparse, Sparse
from modular_experts.deltas.tiles import tile_grid
from modular_experts.library import make_record, open_expert, write_expert
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


def rice_of(numbers):
    """Return the shortest Rice code of numbers, written bit by bit."""
    rests = [number - before - 1 for before, number in zip([-1, *numbers], numbers, strict=False)]
    codes = []
    for low in range(9):
        planes = [bytes_of("".join(str(rest >> bit & 1) for rest in rests)) for bit in range(low)]
        ends = "".join("0" * (rest >> low) + "1" for rest in rests)
        codes.append([low, *(byte for plane in planes for byte in plane), *bytes_of(ends)])
    return min(codes, key=len)


def bytes_of(bits):
    return list(int(bits[::-1], 2).to_bytes(-(-len(bits) // 8), "little"))


def read(name, content, count, limit, dtype=torch.int32):
    assert fits(name, (len(content),), count, limit)
    return decode(name, torch.tensor(content, dtype=torch.uint8), count, limit, dtype)


def numbers_of(distances):
    return (torch.tensor(distances, dtype=torch.int64).cumsum(0) - 1).tolist()


far, near = st.sampled_from(NOTABLE) | st.integers(1, 3000), st.integers(1, 4)
kept = st.tuples(st.lists(far, max_size=40).map(numbers_of), st.integers(0, 9))
crowded = st.tuples(st.lists(near, max_size=200).map(numbers_of), st.integers(0, 9))


@given(kept | crowded, st.sampled_from([torch.int32, torch.int64]))
@example((numbers_of(NOTABLE), 0), torch.int32)
@example(([], 0), torch.int32)
@example(([], 9), torch.int32)
@example((list(range(64)), 0), torch.int32)
@example((list(range(65)), 0), torch.int64)
@example(([0], 0), torch.int32)
@example(([0], 9), torch.int32)
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
    if numbers:
        code = rice_of(numbers)
        assert read("rice", code, len(numbers), limit, dtype).tolist() == numbers
        ((name, stored),) = encode(torch.tensor(numbers, dtype=dtype), limit, "blocks", by_rice=True).items()
        assert stored.numel() * stored.element_size() == min(len(code), *sizes.values())
        assert stored.tolist() == {"blocks": numbers, "rice": code, **ways}[name]


@pytest.mark.parametrize("share", [0.02, 0.05, 0.1, 0.3])
def test_a_rice_code_is_within_two_percent_of_the_entropy(share):
    numbers = (torch.rand(300_000, generator=torch.Generator().manual_seed(0)) < share).nonzero().view(-1).int()
    code = encode(numbers, 300_000, "indices", by_rice=True)["rice"]
    share = len(numbers) / 300_000
    entropy = -300_000 / 8 * (share * math.log2(share) + (1 - share) * math.log2(1 - share))
    assert 0.99 * entropy < len(code) < 1.02 * entropy


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
        ("rice", [0, 0b111], 2, 8, r"its rice cannot stand for 2 numbers in \[0, 8\)$"),
        ("rice", [0, 0b11], 3, 8, r"its rice cannot stand for 3 numbers in \[0, 8\)$"),
        ("rice", [0, 0b101], 2, 2, r"its rice cannot stand for 2 numbers in \[0, 2\), as the last would be 2"),
        ("rice", [2, 1, 1, 0b100], 1, 11, r"its rice cannot stand for 1 numbers in \[0, 11\), as the last would be 11"),
        ("rice", [8, *[1] * 9], 1, 99, r"its rice cannot stand for 1 numbers in \[0, 99\), as the last would be 255"),
        ("rice", [9, *[1] * 9], 1, 99, r"its rice cannot stand for 1 numbers in \[0, 99\)$"),
        ("rice", [255, *[1] * 9], 1, 99, r"its rice cannot stand for 1 numbers in \[0, 99\)$"),
        ("rice", [3, 1, 1, 1], 1, 99, r"its rice cannot stand for 1 numbers in \[0, 99\)$"),
    ],
)
def test_bytes_that_no_encoder_wrote_are_refused(name, content, count, limit, sentence, monkeypatch):
    monkeypatch.setattr("torch.empty", torch.zeros)  # so that no number that is there by chance is refused
    with pytest.raises(ValueError, match=sentence):
        read(name, content, count, limit)


def test_gaps_that_overflow_are_refused():
    gaps = torch.full((2**32 // 255 + 1,), 255, dtype=torch.uint8)  # in 32 bits they add up to less than 256
    with pytest.raises(ValueError, match=r"as the last would be 42949\d{5}"):
        decode("gaps", gaps, len(gaps), 2**31 - 1, torch.int32)


def test_a_size_that_cannot_be_is_refused_before_anything_is_read():
    for name, shape, count, limit in [
        ("gaps", (4,), 5, 100),
        ("gaps", (7,), 5, 300),
        ("gaps", (5, 1), 5, 100),
        ("mask", (12,), 5, 100),
        ("mask", (14,), 5, 100),
        ("mask", (1,), 9, 8),
        ("rice", (1,), 0, 100),
        ("rice", (1,), 9, 100),
        ("rice", (28,), 1, 100),
        ("rice", (5, 1), 5, 100),
        ("indices", (4,), 5, 100),
        ("indices", (5,), 5, 4),
    ]:
        assert not fits(name, shape, count, limit), (name, shape)


RECORD = make_record("SparseExpert", {"id": "base", "revision": None, "fingerprint": "f" * 64})
SHAPE = (40, 50)
KEPT = {
    "indices": Sparse(torch.tensor([1999]).int(), torch.ones(1), torch.Size(SHAPE)),
    "gaps": random_delta("Sparse", SHAPE, 1, torch.float32, share=0.0505),  # an odd number of bytes
    "mask": random_delta("Sparse", SHAPE, 2, torch.float32, share=0.5),
}
TILES = {
    "blocks": BlockSparse(torch.tensor([1999]).int(), torch.ones(1, 1, 1), torch.Size(SHAPE)),
    "gaps": random_delta("BlockSparse", SHAPE, 3, torch.float32, share=0.05, tile=(2, 3)),
    "mask": random_delta("BlockSparse", SHAPE, 4, torch.float32, share=0.5, tile=(3, 3)),
}
DELTAS = {f"entries {name}": delta for name, delta in KEPT.items()} | {f"tiles {n}": d for n, d in TILES.items()}


def test_each_weight_is_stored_in_its_shortest_form_beside_its_values(tmp_path):
    write_expert(tmp_path / "x", DELTAS, RECORD)
    stored = open_expert(tmp_path / "x")
    with safe_open(tmp_path / "x/delta.safetensors", "pt") as tensors:
        for name, delta in DELTAS.items():
            way = name.split()[1]
            assert f"{name}/{way}" in set(tensors.keys())
            assert torch.equal(tensors.get_tensor(f"{name}/values"), delta.values)
            tall, wide = tile_grid(SHAPE, (1, 1) if isinstance(delta, Sparse) else delta.tile)
            size = {"gaps": len(delta.values), "mask": -(-tall * wide // 8)}.get(way, 4)  # no gap is beyond 255
            assert tensors.get_slice(f"{name}/{way}").get_dtype() == ("I32" if way in ("indices", "blocks") else "U8")
            assert stored.stored_bytes()[name] == 4 * delta.values.numel() + size
    assert all(same(stored[name], delta) for name, delta in DELTAS.items())
    assert all(same(stored[name], delta) for name, delta in DELTAS.items()), "and once more, unchecked"


def test_every_number_lies_at_a_multiple_of_its_width(tmp_path):
    write_expert(tmp_path / "x", DELTAS, RECORD)
    content = (tmp_path / "x/delta.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    sizes = {"F32": 4, "I32": 4, "U8": 1}
    places = [(one["data_offsets"], sizes[one["dtype"]]) for name, one in header.items() if name != "__metadata__"]
    assert any(end % 4 for (_, end), _ in places)
    assert not [start for (start, _), size in places if (8 + length + start) % size]


def test_files_from_before_there_was_an_encoding_are_read(tmp_path):
    path = write_by_hand(tmp_path / "old", {name: as_it_is(delta) for name, delta in DELTAS.items()}, RECORD)
    stored = open_expert(path)
    assert all(same(stored[name], delta) for name, delta in DELTAS.items())
    assert stored.kept_entries()["entries gaps"] == DELTAS["entries gaps"].support_size


def test_equal_deltas_have_equal_hashes_whatever_the_dtype_of_their_indices(tmp_path):
    one = write_expert(tmp_path / "one", DELTAS, RECORD)
    wide = {name: type(d)(next(iter(d.tensors().values())).long(), d.values, d.shape) for name, d in DELTAS.items()}
    assert write_expert(tmp_path / "two", wide, RECORD) == one


class Broken(dict):
    """Deltas whose reading is interrupted at one weight."""

    def __init__(self, at):
        super().__init__(DELTAS)
        self.at = at

    def __getitem__(self, name):
        if name == self.at:
            raise KeyboardInterrupt
        return super().__getitem__(name)


@pytest.mark.parametrize("at", list(DELTAS)[1::2])
def test_writing_that_was_interrupted_ends_with_the_same_bytes(tmp_path, at):
    write_expert(tmp_path / "whole", DELTAS, RECORD)
    with pytest.raises(KeyboardInterrupt):
        write_expert(tmp_path / "x", Broken(at), RECORD, key="k")
    write_expert(tmp_path / "x", Broken(next(iter(DELTAS))), RECORD, key="k")  # the first is not asked for again
    assert (tmp_path / "x/delta.safetensors").read_bytes() == (tmp_path / "whole/delta.safetensors").read_bytes()


def byte(*numbers):
    return torch.tensor(numbers, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("form", "shape", "tensors", "sentence"),
    [
        ("Sparse", [3, 4], {"gaps": byte(13)}, r"its gaps cannot stand for 1 .* would be 12 \(w\)"),
        ("Sparse", [3, 4], {"mask": byte(3, 0)}, r"its mask cannot stand for 1 numbers in \[0, 12\) \(w\)"),
        ("Sparse", [3, 4], {"mask": byte(1)}, "are not a Sparse delta"),
        ("Sparse", [2**30, 2**30], {"mask": byte(1)}, "are not a Sparse delta"),
        ("Sparse", [3, 4], {"gaps": byte(1), "mask": byte(1, 0)}, "which are not the tensors of a Sparse delta"),
        ("Sparse", [3, 4], {"blocks": torch.tensor([1]).int()}, "which are not the tensors of a Sparse delta"),
        ("Dense", [1], {"gaps": byte(1)}, "which are not the tensors of a Dense delta"),
        ("Sparse", [3, 4], {"gaps": torch.tensor([1]).int()}, "its gaps are torch.int32 and must be torch.uint8"),
        ("Sparse", [3, 4], {"indices": byte(1)}, "its indices are torch.uint8 and must be torch.int32"),
        ("Sparse", [3, 4], {"gaps": byte(1), "values": torch.full((1,), torch.nan)}, "its values .* are not finite"),
        ("Sparse", [-3, -4], {"gaps": byte(1)}, r"its weight has the shape \[-3, -4\]"),
        ("BlockSparse", [3, 4], {"gaps": byte(5), "values": torch.ones(1, 2, 2)}, r"its gaps cannot .* would be 4"),
        ("BlockSparse", [3, 4], {"gaps": byte(1)}, "are not a BlockSparse delta"),
    ],
)
def test_a_file_with_other_bytes_is_damaged(tmp_path, form, shape, tensors, sentence):
    path = write_by_hand(tmp_path / "x", {"w": (form, shape, {"values": torch.ones(1), **tensors})}, RECORD)
    with pytest.raises(ValueError, match=rf"x/delta.safetensors is damaged: .*{sentence}.*; take it from a copy"):
        open_expert(path).verify()
