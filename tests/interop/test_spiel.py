"""SpIEL: values at flat indices of a linear layer's weight, from either kind of file, and nothing else."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from modular_experts.deltas import Sparse
from modular_experts.interop.import_expert import import_expert

MODULE = "model.layers.1.self_attn.k_proj"  # (16, 32)
KEY = f"base_model.model.{MODULE}.sft_delta"


def adapter(directory, tensors, base, pickled=False):
    directory.mkdir(exist_ok=True)
    config = {"peft_type": "SFT", "density": 0.01, "base_model_name_or_path": str(base), "revision": None}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    if pickled:
        torch.save(tensors, directory / "adapter_model.bin")
    else:
        save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def entries(indices, values=None, dtype=torch.int32):
    values = torch.arange(1.0, len(indices) + 1) if values is None else values
    return {f"{KEY}.indices": torch.tensor(indices, dtype=dtype), f"{KEY}.values": values}


@pytest.mark.parametrize("pickled", [False, True])
def test_values_land_at_their_indices_and_the_base_is_the_adapters(tiny_llama_dir, tmp_path, pickled):
    source = adapter(tmp_path / "spiel", entries([40, 3, 511]), tiny_llama_dir, pickled)
    expert = import_expert(source, tmp_path / "library/x")
    assert list(expert) == [f"{MODULE}.weight"]
    expected = torch.zeros(16, 32)
    expected[1, 8], expected[0, 3], expected[15, 31] = 1.0, 2.0, 3.0
    assert isinstance(expert[f"{MODULE}.weight"], Sparse)
    assert torch.equal(expert[f"{MODULE}.weight"].dense(), expected)
    assert (expert.record["kind"], expert.record["hyperparameters"]) == ("SpIEL", {"density": 0.01})
    assert expert.record["base"]["id"] == str(tiny_llama_dir)
    name = "adapter_model.bin" if pickled else "adapter_model.safetensors"
    assert sorted(expert.record["source"]["sha256"]) == ["adapter_config.json", name]
