"""Weights read from a checkpoint's files one at a time."""

import json
import struct
from pathlib import Path

import pytest
import torch
from conftest import build_model
from safetensors.torch import load, load_file

from modular_experts.base import Base


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float32, "40KB"), (torch.float64, "1GB"), (torch.float16, "40KB"), (torch.bfloat16, "1GB")],
)
def test_weights_are_those_of_the_files_in_any_order(tmp_path, dtype, size):
    build_model("llama", 0).to(dtype).save_pretrained(tmp_path, max_shard_size=size)
    expected = {key: tensor for file in tmp_path.glob("*.safetensors") for key, tensor in load_file(file).items()}
    weights = Base.open(tmp_path).weights
    held = {name: weights.read(name) for name in [*expected, *reversed(expected)]}
    assert held.keys() == expected.keys()
    for name, tensor in held.items():
        assert torch.equal(tensor, expected[name])
        assert weights.dtype(name) == tensor.dtype == dtype
        assert weights.shape(name) == tensor.shape


def test_a_file_whose_numbers_lie_at_odd_places_is_read(tmp_path):
    build_model("llama", 0).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    expected, content = load(file.read_bytes()), file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.dumps(json.loads(content[8 : 8 + length]), separators=(",", ":")).encode()
    header += b" " * (1 - len(header) % 2)
    file.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
    weights = Base.open(tmp_path).weights
    assert all(torch.equal(weights.read(name), tensor) for name, tensor in expected.items())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are listed by Linux")
def test_one_file_is_open_at_a_time(tmp_path):
    build_model("llama", 0).save_pretrained(tmp_path, max_shard_size="20KB")
    files = len(list(tmp_path.glob("*.safetensors")))
    before = len(list(Path("/proc/self/fd").iterdir()))
    weights = Base.open(tmp_path).weights
    held = [weights.read(name) for name in weights.structure.weights]
    del held
    assert files > 3
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1
