"""Stored encodings: what is kept takes its shortest form, files from before are read, forged ones refused."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors import safe_open
from testbed.random_deltas import random_delta
from testbed.stored_by_hand import as_it_is, write_by_hand

from modular_experts.deltas import BlockSparse, Sparse
from modular_experts.deltas.tiles import tile_grid
from modular_experts.library import make_record, open_expert, write_expert

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


def same(one, other):
    tensors, others = one.tensors(), other.tensors()
    return type(one) is type(other) and all(torch.equal(tensors[name], others[name]) for name in tensors)


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
    places = {name: entry for name, entry in header.items() if name != "__metadata__"}
    assert any(entry["data_offsets"][1] % 4 for entry in places.values())
    assert not [
        name for name, entry in places.items() if (8 + length + entry["data_offsets"][0]) % sizes[entry["dtype"]]
    ]


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
        (
            "Sparse",
            [3, 4],
            {"gaps": byte(1), "values": torch.tensor([float("nan")])},
            "its values hold numbers that are not finite",
        ),
        ("Sparse", [-3, -4], {"gaps": byte(1)}, r"its weight has the shape \[-3, -4\]"),
        (
            "BlockSparse",
            [3, 4],
            {"gaps": byte(5), "values": torch.ones(1, 2, 2)},
            r"its gaps cannot stand for 1 .* would be 4",
        ),
        ("BlockSparse", [3, 4], {"gaps": byte(1)}, "are not a BlockSparse delta"),
    ],
)
def test_a_file_with_other_bytes_is_damaged(tmp_path, form, shape, tensors, sentence):
    path = write_by_hand(tmp_path / "x", {"w": (form, shape, {"values": torch.ones(1), **tensors})}, RECORD)
    with pytest.raises(ValueError, match=rf"x/delta.safetensors is damaged: .*{sentence}.*; take it from a copy"):
        open_expert(path).verify()
