"""Kept inputs come back as they were, and are refused where a byte or a bound is wrong."""

import hashlib
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from testbed.random_deltas import random_delta

from modular_experts.library import make_record, open_expert, write_expert
from modular_experts.library.kept_inputs import Prompt, read_inputs, write_inputs
from modular_experts.library.state import write_state

BASE = {"id": "base", "revision": None, "fingerprint": "f" * 64}
INPUTS = {
    "a": [Prompt(torch.tensor([5, 3, 9], dtype=torch.int32), 1), Prompt(torch.tensor([4], dtype=torch.int32), -1)],
    "b": [Prompt(torch.tensor([7, 7], dtype=torch.int32), 2)],
}


def write(path, **more):
    record = make_record("SparseExpert", BASE, tasks=["a", "b"])
    write_expert(path, {"w": random_delta("Sparse", (3, 4), 1)}, record, **more)
    return open_expert(path)


def plain(inputs):
    return {task: [(one.ids.tolist(), one.end) for one in prompts] for task, prompts in inputs.items()}


tokens = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4)
prompts = st.lists(st.tuples(tokens, st.integers(-1, 9)), max_size=3)
# Letters of all kinds that a name may have; to draw from all of Unicode takes two seconds of preparation.
names = st.text("a Z/.\0\n\u00e4\u6f22\U0001f642e\u0301\ufeff", max_size=9)


@given(st.dictionaries(names, prompts, max_size=3))
def test_any_inputs_come_back(tmp_path_factory, given_inputs) -> None:
    inputs = {
        task: [Prompt(torch.tensor(ids, dtype=torch.int32), end) for ids, end in prompts]
        for task, prompts in given_inputs.items()
    }
    if any(inputs.values()):
        file = tmp_path_factory.mktemp("inputs") / "inputs.safetensors"
        assert plain(read_inputs(file, write_inputs(file, inputs))) == plain(inputs)


def test_they_lie_beside_the_expert_and_are_no_part_of_it(tmp_path) -> None:
    with_them, without = write(tmp_path / "x", inputs=INPUTS), write(tmp_path / "y")
    assert plain(with_them.inputs()) == plain(INPUTS)
    assert (with_them.keeps_inputs, without.keeps_inputs, without.inputs()) == (True, False, {})
    assert with_them.content_hash == without.content_hash
    assert with_them.record["inputs"]["rows"] == 3
    # An expert that is written anew does not inherit them.
    write_expert(tmp_path / "z", with_them.items(), with_them.record)
    assert "inputs" not in open_expert(tmp_path / "z").record
    (tmp_path / "x/inputs.safetensors").unlink()
    again = open_expert(tmp_path / "x")
    again.verify()
    assert (again.keeps_inputs, again.inputs()) == (False, {})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ids": torch.tensor([5, -3, 9, 4, 7, 7], dtype=torch.int32)}, "negative number"),
        ({"tasks": torch.tensor([0, 0, 2], dtype=torch.int32)}, "a task that the record does not name"),
        ({"tasks": torch.tensor([0, 0], dtype=torch.int32)}, "the 3 prompts that the record lists"),
        ({"starts": torch.tensor([0, 3, 4, 5])}, "without a gap"),
        ({"starts": torch.tensor([0, 5, 4, 6])}, "without a gap"),
        ({"starts": torch.tensor([1, 3, 4, 6])}, "without a gap"),
        # The differences are 2^63 - 1, 2^63 - 1 and 8, and their sum is 6 in 64 bits.
        ({"starts": torch.tensor([0, 2**63 - 1, -2, 6])}, "without a gap"),
        ({"ids": torch.tensor([5, 3, 9, 4, 7, 7])}, "must hold the vectors"),
        ({"targets": torch.tensor([5])}, "must hold the vectors"),
    ],
)
def test_hostile_inputs_are_refused_though_the_hash_fits(tmp_path, change, reason) -> None:
    expert = write(tmp_path / "x", inputs=INPUTS)
    file = expert.path / "inputs.safetensors"
    sound = {
        "ids": torch.tensor([5, 3, 9, 4, 7, 7], dtype=torch.int32),
        "starts": torch.tensor([0, 3, 4, 6]),
        "tasks": torch.tensor([0, 0, 1], dtype=torch.int32),
        "ends": torch.tensor([1, -1, 2], dtype=torch.int32),
    }
    file.unlink()
    write_state(file, sound | change)
    record = json.loads((expert.path / "expert.json").read_text())
    with pytest.raises(ValueError, match="not those that the record lists"):
        open_expert(expert.path).verify()
    record["inputs"]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (expert.path / "expert.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"inputs.safetensors is damaged: .*{reason}"):
        open_expert(expert.path).verify()


def test_a_record_that_lists_them_wrongly_and_a_link_out_of_the_expert_are_refused(tmp_path) -> None:
    expert = write(tmp_path / "x", inputs=INPUTS)
    file = expert.path / "expert.json"
    for listed in ([], {"sha256": 1}, {"sha256": "0", "tasks": "a", "rows": 1}, {"sha256": "0", "tasks": []}):
        file.write_text(json.dumps({**expert.record, "inputs": listed}))
        with pytest.raises(ValueError, match="the list of its inputs is not what it must be"):
            open_expert(expert.path)
    file.write_text(json.dumps({**expert.record, "inputs": None}))
    assert open_expert(expert.path).inputs() == {}
    file.write_text(json.dumps(expert.record))
    (expert.path / "inputs.safetensors").rename(tmp_path / "secret")
    (expert.path / "inputs.safetensors").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="is a link"):
        open_expert(expert.path).inputs()
