"""The same recipes run by mergekit, in a process of its own, and here: every tensor agrees.

mergekit 0.1.5 is installed beside this package, or MODULAR_EXPERTS_MERGEKIT names a Python that has it. Nothing of it
is imported here.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import build_model, build_tokenizer
from safetensors.torch import load_file

from modular_experts.interop.mergekit.recipe import merge_recipe, read_recipe

PYTHON = os.environ.get("MODULAR_EXPERTS_MERGEKIT") or (sys.executable if find_spec("mergekit") else "")
pytestmark = [pytest.mark.peer, pytest.mark.skipif(not PYTHON, reason="mergekit is not installed here")]

DRIVER = """
import sys
from pathlib import Path
from mergekit.scripts.run_yaml import main

for recipe in sorted(Path(sys.argv[1]).glob("*.yaml")):
    cache = str(recipe.parent / "cache")
    out = str(recipe.with_suffix(""))
    options = ["--quiet", "--no-write-model-card", "--lora-merge-cache", cache, "--random-seed", "0"]
    main([str(recipe), out, *options], standalone_mode=False)
"""
BASE = "base_model: base\n"
BY_PART = "weight: [{filter: self_attn, value: [0.9, 0.1]}, {filter: mlp, value: 0.3}, {value: 0.6}]"
GRADIENT = "weight: [0.1, 1.0], density: [0.2, 1.0, 0.4]"


def models(*parameters, names="abc"):
    """Return `models:` with one of these parameters for each."""
    listed = zip(names, parameters, strict=False)
    return "models:\n" + "".join(f"  - {{model: {name}, parameters: {{{given}}}}}\n" for name, given in listed)


THREE = models(f"{GRADIENT}", f"density: 0.29, {BY_PART}", "weight: -0.4, density: 0.05")
BANDS = models(GRADIENT, f"density: 0.3, {BY_PART}, gamma: [0.0, 0.1]", "weight: 0.4, density: 0.97, gamma: 0.2")
WHOLE = models("weight: 0.4", "weight: 0.8")
WEIGHTED = models(BY_PART, "weight: 0.7", "weight: 0.3")
PAIR = models(BY_PART, "weight: 0.7")
RECIPES = {
    "linear": WEIGHTED + "merge_method: linear",
    "linear-sum": WEIGHTED + "merge_method: linear\nparameters: {normalize: false}",
    "linear-base": WEIGHTED + BASE + "merge_method: linear\nparameters: {weight: 0.25}",
    "task-arithmetic": WEIGHTED + BASE + "merge_method: task_arithmetic\nparameters: {lambda: 0.7}",
    "task-arithmetic-normalize": WEIGHTED + BASE + "merge_method: task_arithmetic\nparameters: {normalize: true}",
    "ties": THREE + BASE + "merge_method: ties\nparameters: {lambda: 1.3}",
    "ties-rescale": THREE + BASE + "merge_method: ties\nparameters: {rescale: true, normalize: false}",
    "breadcrumbs": BANDS + BASE + "merge_method: breadcrumbs",
    "breadcrumbs-ties": BANDS + BASE + "merge_method: breadcrumbs_ties\nparameters: {normalize: true}",
    "dare-ties-whole": WHOLE + BASE + "merge_method: dare_ties",
    "dare-linear-whole": WHOLE + BASE + "merge_method: dare_linear\nparameters: {normalize: true}",
    "della-whole": WHOLE + BASE + "merge_method: della",
    "della-linear-whole": WHOLE + BASE + "merge_method: della_linear",
    "sce": models("", "", "") + BASE + "merge_method: sce\nparameters: {select_topk: [0.3, 1.0]}",
    "ram": models("", "", "") + BASE + "merge_method: ram",
    "ram-plus": models("", "", "") + BASE + "merge_method: ramplus_tl\nparameters: {r: 0.3, alpha: 0.4}",
    "model-stock": models("", "", "") + BASE + "merge_method: model_stock",
    "model-stock-rows": models("", "", "") + BASE + "merge_method: model_stock\nparameters: {filter_wise: true}",
    "slerp": models("")
    + BASE
    + "merge_method: slerp\nparameters: {t: [{filter: mlp, value: [0, 0.5, 1]}, {value: 0.3}]}",
    "nuslerp": PAIR + "merge_method: nuslerp",
    "nuslerp-base": PAIR + BASE + "merge_method: nuslerp",
    "nuslerp-rows": PAIR + BASE + "merge_method: nuslerp\nparameters: {nuslerp_flatten: false}",
    "nuslerp-columns": PAIR + "merge_method: nuslerp\nparameters: {nuslerp_flatten: false, nuslerp_row_wise: true}",
    "multislerp": WEIGHTED + "merge_method: multislerp",
    "multislerp-base": WEIGHTED + BASE + "merge_method: multislerp\nparameters: {normalize_weights: false}",
    "karcher": models("", "", "") + "merge_method: karcher",
    "karcher-base": models("", "") + BASE + "merge_method: karcher",
    "tokenizer": WEIGHTED + BASE + "merge_method: task_arithmetic\ntokenizer_source: base",
    "tied": models("weight: 0.3", "weight: [0, 1]", names=["tied-a", "tied-b"]) + "merge_method: linear",
    "gpt2": models("weight: [0, 1]", names=["gpt2-a"]) + "base_model: gpt2-b\nmerge_method: task_arithmetic",
    "qwen3": models("weight: [0, 1]", names=["qwen3-a"]) + "base_model: qwen3-b\nmerge_method: task_arithmetic",
    "slices": """
merge_method: linear
slices:
  - sources: [{model: a, layer_range: [0, 4], parameters: {weight: [0.1, 0.9]}}, {model: b, layer_range: [0, 4]}]
    parameters: {weight: 0.6}
parameters: {weight: 0.2}""",
}
DROPPING = {
    "dare-half": models("weight: 1, density: 0.4") + BASE + "merge_method: dare_linear",
    "della-half": models("weight: 1, density: 0.4, epsilon: 0.3") + BASE + "merge_method: della_linear",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with the models, and with mergekit's merge of each recipe."""
    root = tmp_path_factory.mktemp("peer")
    for seed, name in enumerate(["base", "a", "b", "c"]):
        save(moved("llama", seed, num_hidden_layers=4), root / name)
    for seed, name in enumerate("ab", 1):
        save(moved("llama", seed, tie_word_embeddings=True), root / f"tied-{name}")
        save(moved("gpt2", seed), root / f"gpt2-{name}")
        save(moved("qwen3", seed), root / f"qwen3-{name}")
    (root / "recipes").mkdir()
    for name, recipe in {**RECIPES, **DROPPING}.items():
        (root / "recipes" / f"{name}.yaml").write_text(recipe + "\ndtype: float32\nout_dtype: float32\n")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [PYTHON, "-c", DRIVER, "recipes"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return root


def moved(architecture, seed, **changes):
    """Return a model that is a little away from the one that all of its architecture start from."""
    model = build_model(architecture, 0, **changes)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * bool(seed) * torch.randn(parameter.shape, generator=draw))
    return model


def save(model, directory):
    model.save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    config = directory / "tokenizer_config.json"
    config.write_text(config.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))  # its older name


def both(place, name, monkeypatch):
    """Return the tensors of a recipe's merge as made by mergekit and as made here."""
    monkeypatch.chdir(place)
    ours = Path("ours") / name
    merge_recipe(read_recipe(f"recipes/{name}.yaml"), ours)
    return load_file(f"recipes/{name}/model.safetensors"), load_file(ours / "model.safetensors")


@pytest.mark.parametrize("name", RECIPES)
def test_every_tensor_agrees_with_mergekit(place, name, monkeypatch):
    theirs, ours = both(place, name, monkeypatch)
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-6, atol=3e-7, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize(("name", "spread"), [("dare-half", 0.0), ("della-half", 0.3)])
def test_what_is_dropped_at_random_has_the_same_odds_and_the_same_length(place, name, spread, monkeypatch):
    base, tuned = load_file(place / "base/model.safetensors"), load_file(place / "a/model.safetensors")
    for merged in both(place, name, monkeypatch):
        large = small = count = 0
        for key, start in base.items():
            delta, kept = tuned[key] - start, merged[key] - start
            assert kept.abs().sum().item() == pytest.approx(delta.abs().sum().item(), rel=1e-3)
            if delta.ndim == 2:
                upper = delta.abs() > delta.abs().median(dim=1, keepdim=True).values
                large += (kept != 0)[upper].sum().item() / upper.sum().item() * delta.numel()
                small += (kept != 0)[~upper].sum().item() / (~upper).sum().item() * delta.numel()
                count += delta.numel()
        noise = 4 * (0.25 / count * 2) ** 0.5
        # ranks from the middle up stay with density + spread / 2 on average; an even row is cut in the middle
        assert abs(large / count - (0.4 + spread / 2)) < noise
        assert abs(small / count - (0.4 - spread / 2)) < noise
