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


REFUSED = [
    (entries([3, 512]), r"the indices of .*k_proj are doubled, or outside of its shape \(16, 32\)"),
    (entries([-1, 5]), "doubled, or outside"),
    (entries([5, 5]), "doubled, or outside"),
    (entries([5, 6], dtype=torch.float32), "doubled, or outside"),
    (entries([5, 6], torch.ones(3)), "does not have one value for each index"),
    ({f"{KEY}.values": torch.ones(2)}, "does not have one value for each index"),
    (entries([1]) | {"base_model.model.score.weight": torch.ones(2)}, "score.weight, which is not a sparse delta"),
    (
        {"base_model.model.model.layers.9.self_attn.k_proj.sft_delta.values": torch.ones(1)},
        r"moves model.layers.9.self_attn.k_proj.weight, .* no such weight; did you mean",
    ),
]


def test_what_does_not_fit_is_refused_and_nothing_is_written(tiny_llama_dir, tmp_path):
    for tensors, sentence in REFUSED:
        with pytest.raises(ValueError, match=sentence):
            import_expert(adapter(tmp_path / "spiel", tensors, tiny_llama_dir), tmp_path / "library/x")
        assert not (tmp_path / "library").exists() or not list((tmp_path / "library").iterdir())


def test_missing_weights_and_a_tied_weight_are_refused(tiny, tiny_llama_dir, tmp_path):
    source = adapter(tmp_path / "spiel", entries([1]), tiny_llama_dir)
    (source / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors is missing, so the adapter has no tensors"):
        import_expert(source, tmp_path / "library/x")
    key = "base_model.model.lm_head.sft_delta"
    head = {f"{key}.values": torch.ones(1), f"{key}.indices": torch.tensor([1])}
    source = adapter(tmp_path / "head", head, tiny("gpt2"))
    with pytest.raises(ValueError, match=r"moves lm_head.weight alone, and .* are one tensor \(tied\)"):
        import_expert(source, tmp_path / "library/x")
