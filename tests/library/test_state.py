"""A state is part of the expert and checked at every read; experts of deltas alone stay as they were."""

import json

import pytest
import torch
from testbed.random_deltas import random_delta

from modular_experts.library import make_record, open_expert, write_expert

BASE = {"id": "base", "revision": None, "fingerprint": "f" * 64}
RECORD = make_record("Gated", BASE, class_path="mine.Gated", not_mergeable_because="its gate depends on the input")
STATE = {
    "w/shift": torch.randn(7, generator=torch.Generator().manual_seed(1)),
    "w/gate.weight": torch.randn(3, 4, dtype=torch.float64).T,
    "w/mask": torch.tensor([True, False]),
    "w/counts": torch.arange(5),
    "w/half": torch.ones(2, 2, dtype=torch.bfloat16),
    "w/scale": torch.tensor(2.0),
}


@pytest.fixture
def expert(tmp_path):
    write_expert(tmp_path / "library/x", {}, RECORD, state=STATE)
    return tmp_path / "library/x"


def test_a_state_comes_back_bit_for_bit_in_every_dtype(expert) -> None:
    found = open_expert(expert).state()
    assert found.keys() == STATE.keys()
    for name, tensor in STATE.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    found["w/shift"].zero_()
    assert torch.equal(open_expert(expert).state()["w/shift"], STATE["w/shift"])


def test_the_content_hash_covers_the_state(expert) -> None:
    delta = {"w": random_delta("Sparse", (3, 4), 1)}
    changed, path = {**STATE, "w/scale": torch.tensor(3.0)}, expert.parent
    cases = {"a": ({}, changed), "b": (delta, STATE), "c": (delta, changed), "d": (delta, None)}
    hashes = {write_expert(path / name, deltas, RECORD, state=state) for name, (deltas, state) in cases.items()}
    assert len({*hashes, open_expert(expert).content_hash}) == 5
    (path / "a/state.safetensors").replace(expert / "state.safetensors")
    with pytest.raises(ValueError, match=r"state.safetensors is damaged: its content hash is not the one in"):
        open_expert(expert)


ROUTED = {"kind": "routed", "class_path": "mine.Router", "hyperparameters": {"router": "Router", "reach": 0.5}}
PARENTS = [{"name": name, "content_hash": name * 64, "tasks": [name]} for name in "ab"]


def test_a_routed_expert_is_its_router_its_settings_and_its_experts_in_order(expert) -> None:
    def written(**changes) -> str:
        record = RECORD | ROUTED | {"parents": PARENTS} | changes
        return write_expert(expert.parent / "r", {}, record, overwrite=True, state=STATE)

    others = [{"name": name, "content_hash": name * 64} for name in "ac"]
    first = written()
    assert written(parents=[one | {"name": "moved"} for one in PARENTS], created="later", scores={"x": 1}) == first
    hashes = [
        written(class_path="mine.Other"),
        written(hyperparameters={"router": "Router", "reach": 0.25}),
        written(parents=PARENTS[::-1]),
        written(parents=others),
        written(parents=[*PARENTS, others[1]]),
        write_expert(expert.parent / "trained", {}, RECORD | {"parents": PARENTS}, state=STATE),
    ]
    assert len({first, *hashes}) == 7
    assert hashes[-1] == open_expert(expert).content_hash, "the parents of any other expert are no part of it"
    file = expert.parent / "r/expert.json"
    written()
    file.write_text(file.read_text().replace("mine.Router", "mine.Routes"))
    with pytest.raises(ValueError, match=r"state.safetensors is damaged: its content hash is not the one in"):
        open_expert(file.parent)


def test_every_flipped_byte_of_a_state_is_noticed(expert) -> None:
    file = expert / "state.safetensors"
    whole = file.read_bytes()
    for position in range(0, len(whole), 23):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        with pytest.raises(ValueError, match=r"state.safetensors is damaged"):
            open_expert(expert).verify()


def test_the_format_is_version_2_only_where_there_is_a_state(expert) -> None:
    delta = {"w": random_delta("Sparse", (3, 4), 1)}
    write_expert(expert.parent / "both", delta, RECORD, state=STATE)
    both = open_expert(expert.parent / "both")
    write_expert(expert.parent / "plain", delta, both.record)
    plain = open_expert(expert.parent / "plain")
    assert [open_expert(expert).record["format"], both.record["format"]] == ["modular-experts/2"] * 2
    assert plain.record["format"] == "modular-experts/1"
    assert "files" not in plain.record
    assert (plain.state(), both.record["files"]) == ({}, ["delta.safetensors", "state.safetensors"])
    read = (expert.parent / "both/delta.safetensors").read_bytes()
    assert read == (expert.parent / "plain/delta.safetensors").read_bytes()


def test_a_list_of_files_that_leads_elsewhere_is_refused(expert) -> None:
    record = json.loads((expert / "expert.json").read_text())
    for files in ([], ["delta.safetensors"], ["../x"], ["state.safetensors", "x"], "state.safetensors"):
        (expert / "expert.json").write_text(json.dumps({**record, "files": files}))
        with pytest.raises(ValueError, match="the list of its files is not what it must be"):
            open_expert(expert)
