"""The command `mergekit`: what it prints and what it writes."""

import pytest
import torch
from safetensors.torch import load_file

from modular_experts.__main__ import main

RECIPE = """
merge_method: ties
base_model: {base}
models:
  - model: {model}
    parameters: {{weight: 1, density: 0.5}}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch, tiny_llama_dir):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format(base=tiny_llama_dir, model=f"{tiny_llama_dir}/../llama"))
    return file


def test_recipe_is_merged(recipe, tmp_path, capsys, tiny_llama_dir):
    assert main(["mergekit", "recipe.yaml", "merged"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[-1].startswith("merged: a checkpoint of ")
    merged, base = load_file(tmp_path / "merged/model.safetensors"), load_file(tiny_llama_dir / "model.safetensors")
    assert merged.keys() == base.keys()
    assert all(torch.equal(merged[name], base[name]) for name in base)  # the one model is the base itself
