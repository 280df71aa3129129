"""Experts whose values are stored in few bits: exact round trips, sizes, merges, and hostile files."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from testbed.random_deltas import FORMS, random_delta, seeds, shapes

from modular_experts.deltas import BlockSparse, LowRank
from modular_experts.deltas.encodings import ENCODINGS
from modular_experts.deltas.tiles import gather_tiles
from modular_experts.library import make_record, open_expert, write_expert
from modular_experts.library.encoded import VALUE_TYPES
from modular_experts.library.packing import pack, packed_bytes, unpack

RECORD = make_record("SparseExpert", {"id": "base", "fingerprint": "f"}, ["task"])


def _written(folder, encoding, deltas=None):
    each = {form: random_delta(form, (40, 24), seed, tile=(16, 16)) for seed, form in enumerate(FORMS)}
    deltas = deltas or {f"{form}.weight": delta for form, delta in each.items()}
    write_expert(folder, deltas, RECORD, encoding=encoding)
    return open_expert(folder), deltas


@given(form=st.sampled_from(FORMS), shape=shapes, seed=seeds, encoding=st.sampled_from(VALUE_TYPES))
def test_a_delta_comes_back_as_what_its_bytes_stand_for(form, shape, seed, encoding):
    delta = random_delta(form, shape, seed)
    packed, values = pack(delta, encoding)
    read = unpack(values, packed)
    assert type(read) is type(delta)
    assert read.shape == delta.shape
    assert torch.equal(read.support(), delta.support())
    assert packed_bytes(delta, encoding) == [sum(tensor.nbytes for tensor in packed.values())]
    again, _ = pack(read, encoding)
    assert torch.equal(unpack(values, again).dense(), read.dense())
    if encoding == "float32":
        assert torch.equal(read.dense(), delta.to(dtype=torch.float32).dense())


@pytest.mark.parametrize("encoding", VALUE_TYPES)
def test_an_expert_on_disk_is_what_was_stored(tmp_path, encoding):
    expert, deltas = _written(tmp_path / "x", encoding)
    expert.verify()
    assert expert.record["format"] == ("modular-experts/1" if encoding == "float32" else "modular-experts/4")
    assert expert.record.get("encoding", "float32") == encoding
    assert expert.tiles() == {"BlockSparse.weight": (16, 16)}
    for name, delta in deltas.items():
        packed, values = pack(delta, encoding)
        assert torch.equal(expert[name].dense(), unpack(values, packed).dense())
        assert expert.stored_bytes()[name] == sum(tensor.nbytes for tensor in packed.values())
        assert expert.kept_entries()[name] == delta.support_size


@pytest.mark.parametrize("tile", [(16, 16), (1, 24), (40, 1), (7, 5)])
def test_entries_beyond_the_edge_stay_zero(tile):
    full = torch.ones(40, 24)
    blocks = torch.arange(-(-40 // tile[0]) * -(-24 // tile[1]), dtype=torch.int32)
    delta = BlockSparse(blocks, gather_tiles(full, blocks, tile), full.shape)
    for encoding in ENCODINGS:
        packed, values = pack(delta, encoding)
        read = unpack(values, packed)
        assert torch.equal(read.values == 0, delta.values == 0), encoding
        torch.testing.assert_close(read.values, delta.values, rtol=2**-7, atol=0)


@pytest.mark.parametrize("encoding", VALUE_TYPES)
def test_rows_and_columns_that_a_low_rank_delta_leaves_stay_zero(encoding):
    """Such as the further rows of a larger vocabulary; signs have no zero."""
    delta = random_delta("LowRank", (12, 9), 3)
    left = LowRank(delta.up.index_fill(0, torch.tensor([4, 11]), 0.0), delta.down)
    for one in (left, left.T):
        packed, values = pack(one, encoding)
        read = unpack(values, packed).dense()
        assert torch.equal(read.any(1), one.dense().any(1))
        assert torch.equal(read.any(0), one.dense().any(0))
        assert packed_bytes(one, encoding) == [sum(tensor.nbytes for tensor in packed.values())]


def test_bits_of_a_sparse_weight(tmp_path):
    # 5 % of 200 x 1000 entries: 10,000 places by a Rice code, and a scale of two bytes for each of 200 rows.
    delta = random_delta("Sparse", (200, 1000), 0, share=0.05)
    for name, encoding in ENCODINGS.items():
        expert, _ = _written(tmp_path / name, name, {"w.weight": delta})
        places = len(pack(delta, name)[0]["rice"])
        assert 8 * places < 1.02 * 5.72 * 10_000
        assert expert.stored_bytes()["w.weight"] == places + 10_000 * encoding.bits // 8 + 400 * encoding.magnitudes


def test_other_encodings_are_other_experts_and_a_copy_in_float32_is_none_that_is_encoded(tmp_path):
    experts = {name: _written(tmp_path / name, name)[0] for name in VALUE_TYPES}
    assert len({one.content_hash for one in experts.values()}) == len(VALUE_TYPES)
    expert = experts["int4"]
    write_expert(tmp_path / "y", expert, expert.record)
    copy = open_expert(tmp_path / "y")
    assert "encoding" not in copy.record
    assert copy.record["format"] == "modular-experts/1"
    assert all(torch.equal(copy[name].dense(), expert[name].dense()) for name in expert)
    with pytest.raises(ValueError, match=r"not as 'int5'; did you mean int"):
        _written(tmp_path / "x", "int5")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("form", ["Sparse", None])
def test_a_state_lies_beside_encoded_values(tmp_path, form):
    deltas = {} if form is None else {"w.weight": random_delta(form, (30, 20), 0)}
    write_expert(tmp_path / "x", deltas, RECORD, state={"w.weight/cores": torch.ones(3)}, encoding="int4")
    expert = open_expert(tmp_path / "x")
    expert.verify()
    assert list(expert) == list(deltas)
    assert expert.state()["w.weight/cores"].tolist() == [1, 1, 1]


def _forge(folder, change):
    """Rewrite an expert's file after `change(tensors, entry)`, with metadata to match but the hashes as they were."""
    file = folder / "delta.safetensors"
    tensors = load_file(file)
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        metadata = json.loads(json.loads(opened.read(length))["__metadata__"]["modular_experts"])
    change(tensors, metadata["weights"]["w.weight"])
    save_file(tensors, file, {"modular_experts": json.dumps(metadata)})


def _sized(size):
    return lambda tensors, entry: entry["sizes"].update(values=size)


def _encoded(name):
    return lambda tensors, entry: entry.update(encoding=name)


def _with(part, change):
    return lambda tensors, entry: tensors.update({f"w.weight/{part}": change(tensors[f"w.weight/{part}"])})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_sized([10**12]), "values in int4 are the tensors"),
        (_sized([-1]), "values have the shape"),
        (_sized([True]), "values have the shape"),
        (_sized([3, 4]), "values have the shape"),
        (_encoded("int9"), "not as 'int9'"),
        (_encoded("sign"), "values in sign are the tensors"),
        (_encoded("bfloat16"), "have the shapes"),
        (_encoded(["int4"]), "not as"),
        (lambda tensors, entry: entry.pop("sizes"), "have the shapes"),
        (lambda tensors, entry: entry.pop("encoding"), "have the shapes"),
        (_with("values.codes", lambda codes: codes[:, :-1].contiguous()), "values in int4 are the tensors"),
        (_with("values.scales", torch.Tensor.float), "values in int4 are the tensors"),
    ],
)
def test_forged_files_are_refused(tmp_path, change, sentence):
    _written(tmp_path / "x", "int4", {"w.weight": random_delta("Sparse", (30, 20), 0)})
    _forge(tmp_path / "x", change)
    with pytest.raises(ValueError, match=f"is damaged: .*{sentence}"):
        open_expert(tmp_path / "x")


def test_a_scale_that_makes_infinite_values_is_refused():
    packed, values = pack(random_delta("Sparse", (30, 20), 0), "int8")
    packed["values.scales"] = torch.full_like(packed["values.scales"], torch.finfo(torch.bfloat16).max)
    with pytest.raises(ValueError, match="not finite"):
        unpack(values, packed)
