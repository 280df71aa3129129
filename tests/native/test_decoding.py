"""Compiled decoding gives torch's bits, refuses what torch refuses, and writes no further than there is room."""

import math
from dataclasses import replace

import pytest
import torch
from testbed.pairwise import pairwise
from testbed.random_deltas import random_delta

from modular_experts.deltas.encodings import ENCODINGS, Encoded, to_planes
from modular_experts.library.packing import pack, unpack
from modular_experts.native import sparse_passes
from modular_experts.native.sparse_passes import decode_numbers, decode_values

CASES = [
    ("Sparse", (90, 70), (1, 1)),
    ("Sparse", (6300,), (1, 1)),
    ("BlockSparse", (96, 64), (16, 16)),
    ("BlockSparse", (90, 70), (16, 16)),
    ("BlockSparse", (90, 70), (1, 70)),
    ("BlockSparse", (90, 70), (90, 1)),
    ("BlockSparse", (90, 70), (7, 100)),
    ("LowRank", (700, 500), (1, 1)),
    ("Dense", (90, 7, 10), (1, 1)),
    ("Dense", (6300,), (1, 1)),
]


@pytest.fixture(autouse=True)
def compiled() -> None:
    if sparse_passes.compiled_passes() is None:
        pytest.skip("no C++ compiler makes the passes here")


def _outcome(stored, packed, check=True):
    """Return the bits of a delta's tensors, or the sentence that refuses it."""
    try:
        delta = unpack(stored, packed, check)
    except (ValueError, IndexError) as error:
        return str(error)
    return {name: own.numpy().tobytes() for name, own in delta.tensors().items()}


def _both(stored, packed, monkeypatch, check=True):
    mine = _outcome(stored, packed, check)
    with monkeypatch.context() as patch:
        patch.setattr(sparse_passes, "LEAST", 2**62)  # as where there is no compiler
        return mine, _outcome(stored, packed, check)


@pytest.mark.parametrize(
    ("case", "encoding", "share"), pairwise(CASES, sorted(ENCODINGS), [0.05, 0.2, 0.7, 1.0]), ids=str
)
def test_the_bits_are_those_of_torch(case, encoding, share, monkeypatch) -> None:
    form, shape, tile = case
    delta = random_delta(form, shape, 3, torch.float32, share=share, tile=tile)
    packed, stored = pack(delta * 1e-3, encoding)
    mine, wanted = _both(stored, packed, monkeypatch)
    assert isinstance(mine, dict)
    assert mine == wanted


def test_a_pass_serves_each_of_these_deltas() -> None:
    for form, shape, tile in CASES:
        packed, stored = pack(random_delta(form, shape, 3, torch.float32, tile=tile), "int4")
        kept = getattr(unpack(stored, packed), "blocks" if form == "BlockSparse" else "indices", None)
        for name, size in stored.sizes.items():
            encoded = Encoded(packed[f"{name}.codes"], packed[f"{name}.scales"], math.prod(size))
            assert decode_values(ENCODINGS["int4"], encoded, kept, stored.layout(name)) is not None, (form, name)


@pytest.mark.parametrize("seed", range(40))
def test_forged_bytes_have_the_same_end_as_in_torch(seed, monkeypatch) -> None:
    draw = torch.Generator().manual_seed(seed)
    form, shape, tile = CASES[seed % len(CASES)]
    delta = random_delta(form, shape, seed, torch.float32, share=[0.04, 0.5][seed % 2], tile=tile)
    packed, stored = pack(delta, sorted(ENCODINGS)[seed % 5])
    for own in packed.values():
        flat = own.view(torch.uint8).view(-1)
        for place in torch.randint(len(flat), (1 + seed // 10,), generator=draw).tolist():
            flat[place] = int(torch.randint(256, (1,), generator=draw))
    for check in (True, False):
        mine, wanted = _both(stored, packed, monkeypatch, check)
        assert mine == wanted


def test_scales_that_only_some_codes_make_infinite_are_left_to_torch(monkeypatch) -> None:
    packed, stored = pack(random_delta("Sparse", (90, 70), 0, torch.float32) * 1e37, "int8")
    mine, wanted = _both(stored, packed, monkeypatch)
    assert isinstance(mine, dict)
    assert mine == wanted
    packed["values.scales"].fill_(1.7e38)
    mine, wanted = _both(stored, packed, monkeypatch)
    assert mine == wanted == "its values hold numbers that are not finite"


def test_places_outside_of_the_rows_and_other_tensors_are_left_to_torch() -> None:
    packed, stored = pack(random_delta("Sparse", (90, 70), 0, torch.float32), "int4")
    count = stored.sizes["values"][0]
    encoded = Encoded(packed["values.codes"], packed["values.scales"], count)
    for place, wrong in ((-1, 90 * 70), (-1, 2**31 - 1), (0, -(2**31)), (0, -90)):
        kept = torch.arange(count, dtype=torch.int32)
        kept[place] = wrong
        assert decode_values(ENCODINGS["int4"], encoded, kept, stored.layout("values")) is None
    tiles, stored = pack(random_delta("BlockSparse", (96, 64), 0, torch.float32, tile=(16, 16)), "int4")
    encoded = Encoded(tiles["values.codes"], tiles["values.scales"], math.prod(stored.sizes["values"]))
    for wrong in (24, 2**31 - 1, -(2**31)):
        blocks = torch.full((stored.sizes["values"][0],), wrong, dtype=torch.int32)
        assert decode_values(ENCODINGS["int4"], encoded, blocks, stored.layout("values")) is None
    packed, stored = pack(random_delta("Dense", (90, 70), 0, torch.float32), "sign")
    encoded, layout = Encoded(packed["dense.codes"], packed["dense.scales"], 6300), stored.layout("dense")
    assert decode_values(ENCODINGS["sign"], encoded, None, layout) is not None
    for other in (replace(encoded, scales=encoded.scales.float()), replace(encoded, planes=encoded.planes[:, ::2])):
        assert decode_values(ENCODINGS["sign"], other, None, layout) is None
    assert decode_numbers("gaps", torch.ones(9000).int(), 9000) is None


@pytest.mark.parametrize(("share", "far"), [(0.5, 1), (0.01, 1), (0.01, 40)])
def test_gaps_are_decoded_to_the_numbers(share, far) -> None:
    kept = torch.rand(300_000, generator=torch.Generator().manual_seed(8)) < share
    numbers = kept.nonzero()[:, 0].int() * far
    distances = numbers.diff(prepend=torch.tensor([-1])).tolist()
    gaps = torch.tensor([b for d in distances for b in [0] * ((d - 1) // 255) + [(d - 1) % 255 + 1]]).byte()
    found, last = decode_numbers("gaps", gaps, len(numbers))
    assert torch.equal(found, numbers)
    assert last == int(numbers[-1])


def test_gaps_of_another_number_of_entries_are_told() -> None:
    gaps = torch.ones(5000, dtype=torch.uint8)
    assert decode_numbers("gaps", gaps, 5000)[1] == 4999
    assert decode_numbers("gaps", gaps, 4999)[1] is None
    assert decode_numbers("gaps", gaps, 5001)[1] is None
    gaps[-1] = 0
    assert decode_numbers("gaps", gaps, 4999)[1] is None
    gaps[-1], gaps[7] = 1, 0
    assert decode_numbers("gaps", gaps, 4999)[1] == 4998 + 255


def test_no_more_numbers_are_written_than_there_is_room_for() -> None:
    gaps, mask = torch.ones(5000, dtype=torch.uint8), torch.full((5001,), 0b10010, dtype=torch.uint8)
    numbers, passes = torch.full((10_002,), -7, dtype=torch.int32), sparse_passes.compiled_passes()
    assert passes.decode_gaps(gaps.data_ptr(), 5000, 4990, numbers.data_ptr()) == -2
    assert numbers[4990:].eq(-7).all()
    assert passes.decode_mask(mask.data_ptr(), 5001, 9_990, numbers.data_ptr()) == -2
    mask[0] = 0  # a Rice code without low bits
    assert passes.decode_rice(mask.data_ptr(), 5001, 9_990, numbers.data_ptr()) == -2
    assert numbers[9_990:].eq(-7).all()


@pytest.mark.parametrize(("share", "limit"), [(0.2, 70_001), (1.0, 2**16)])
def test_masks_are_decoded_to_the_numbers(share, limit) -> None:
    kept = torch.rand(limit, generator=torch.Generator().manual_seed(9)) < share
    kept[-1] = True
    numbers = kept.nonzero()[:, 0].int()
    mask = torch.tensor(list(sum(1 << place for place in numbers.tolist()).to_bytes(-(-limit // 8), "little"))).byte()
    found, last = decode_numbers("mask", mask, len(numbers))
    assert torch.equal(found, numbers)
    assert last == limit - 1
    for count in (0, len(numbers) - 1, len(numbers) + 1):
        assert decode_numbers("mask", mask, count)[1] is None


@pytest.mark.parametrize("low", [0, 4, 8])
def test_rice_codes_are_decoded_to_the_numbers(low) -> None:
    draw = torch.Generator().manual_seed(10)
    quotients = torch.randint(0, 6, (9_001,), generator=draw)
    rests = torch.randint(0, 1 << low, (9_001,), generator=draw)
    numbers = ((quotients << low) + rests + 1).cumsum(0) - 1
    ends = (quotients + 1).cumsum(0) - 1
    mask = torch.tensor(list(sum(1 << end for end in ends.tolist()).to_bytes(-(-(int(ends[-1]) + 1) // 8), "little")))
    code = torch.cat([torch.tensor([low]).byte(), to_planes(rests.byte(), low).view(-1), mask.byte()])
    found, last = decode_numbers("rice", code, len(numbers))
    assert torch.equal(found, numbers.int())
    assert last == int(numbers[-1])
    for count in (8_999, 9_002):
        assert decode_numbers("rice", code, count)[1] is None
    code[0] = 9
    assert decode_numbers("rice", code, len(numbers))[1] is None


def test_the_last_number_of_gaps_and_of_a_rice_code_is_right_beyond_int32() -> None:
    gaps = torch.full((9_000_000,), 255, dtype=torch.uint8)
    assert decode_numbers("gaps", gaps, len(gaps))[1] == 255 * len(gaps) - 1 > 2**31
    code = torch.zeros(1 + 8_000 + 2**21, dtype=torch.uint8)
    code[0], code[1:8_001], code[-1000:] = 8, 255, 255
    assert decode_numbers("rice", code, 8_000)[1] == ((8 * (2**21 - 1000)) << 8) + 8_000 * 256 - 1 > 2**31
