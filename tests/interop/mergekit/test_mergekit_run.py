"""Recipes run on tiny models; `tests/soak/families/recipes.py` compares each method with its formula."""

import json
import shutil
from functools import partial

import pytest
import torch
from conftest import build_model, build_tokenizer
from safetensors.torch import load_file
from test_mergekit_peer import moved
from testbed.stored_by_hand import number_the_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from modular_experts.interop.mergekit.recipe import merge_recipe, read_recipe

LAYERS = 3


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a base and three models that were made from it, all float32."""
    root = tmp_path_factory.mktemp("models")
    for number, name in enumerate(["base", "a", "b", "c"]):
        moved("llama", number, num_hidden_layers=LAYERS).save_pretrained(root / name)
        build_tokenizer().save_pretrained(root / name)
    return root


@pytest.fixture
def run(place, tmp_path, monkeypatch):
    """Run a recipe whose models are called by their names; return the tensors of the merge, in float64."""
    monkeypatch.chdir(place)

    def merge(recipe, **settings):
        file = tmp_path / "recipe.yaml"
        file.write_text(recipe)
        merge_recipe(read_recipe(file), tmp_path / "merged", overwrite=True, **settings)
        return {name: tensor.double() for name, tensor in load_file(tmp_path / "merged/model.safetensors").items()}

    return merge


def tensors(place, name):
    return {key: tensor.double() for key, tensor in load_file(place / name / "model.safetensors").items()}


def assert_merge(merged, expected):
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        told = partial("{}: {}".format, name)
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=3e-7, msg=told)


def test_linear_that_is_not_normalised_scales_the_base_too(run, place):
    merged = run(
        "merge_method: linear\nbase_model: base\nmodels: [{model: a}, {model: b, parameters: {weight: 0.5}}]\n"
        "parameters: {weight: 0.75, normalize: false}"
    )
    base, a, b = (tensors(place, name) for name in ("base", "a", "b"))
    assert_merge(merged, {name: 0.75 * a[name] + 0.5 * b[name] + 0.75 * base[name] for name in a})


def test_merge_is_an_ordinary_checkpoint_in_the_asked_data_type(run, place, tmp_path):
    merged = run(
        "merge_method: slerp\nbase_model: base\nmodels: [{model: a}]\nparameters: {t: 0}\nout_dtype: bfloat16\n"
        "tokenizer_source: base"
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").get_vocab() == build_tokenizer().get_vocab()
    assert_merge(merged, {name: tensor.bfloat16().double() for name, tensor in tensors(place, "base").items()})
    manifest = json.loads((tmp_path / "merged/modular_experts.json").read_text())
    assert manifest["mergekit"]["merge_method"] == "slerp"
    assert set(manifest["models"]) == {"a", "base"}


ONE = "base_model: base\nmodels: [{model: other, parameters: {weight: 1}}]\nmerge_method: task_arithmetic\n"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_hidden_layers": 2}, "base has model.layers.2.* more, and .*other does not"),
        ({"intermediate_size": 40}, "has shape .* in .*base and .*other"),
        ({"tie_word_embeddings": True}, "only one of .*base and .*other ties its embeddings"),
    ],
)
def test_models_of_different_make_are_refused(run, place, changes, told, tmp_path):
    build_model("llama", 0, **{"num_hidden_layers": LAYERS, **changes}).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=told):
        run(ONE.replace("other", str(tmp_path / "other")))
    assert not (tmp_path / "merged").exists()


def test_files_are_divided_as_those_of_the_first_model_and_listed(run, place, tmp_path):
    recipe = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}"
    whole = run(recipe)
    AutoModelForCausalLM.from_pretrained(place / "a").save_pretrained(tmp_path / "parted", max_shard_size="20KB")
    (tmp_path / "recipe.yaml").write_text(recipe.replace("model: a", f"model: {tmp_path / 'parted'}"))
    merge_recipe(read_recipe(tmp_path / "recipe.yaml"), tmp_path / "cut")
    index, first = (
        json.loads((tmp_path / one / "model.safetensors.index.json").read_text()) for one in ("cut", "parted")
    )
    assert index["weight_map"] == first["weight_map"]
    assert len({*index["weight_map"].values()}) > 2
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "cut" / file)[name].double(), whole[name])


def test_a_merge_of_a_model_in_one_numbered_file_can_be_loaded(place, tmp_path):
    shutil.copytree(place / "a", tmp_path / "a")
    number_the_file(tmp_path / "a")
    recipe = tmp_path / "recipe.yaml"
    models = f"models: [{{model: {tmp_path / 'a'}}}, {{model: {place / 'b'}}}]"
    recipe.write_text(f"merge_method: linear\nparameters: {{weight: 0.5}}\n{models}\n")
    merge_recipe(read_recipe(recipe), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    a, b = tensors(place, "a"), tensors(place, "b")
    assert_merge({name: merged[name].double() for name in a}, {name: (a[name] + b[name]) / 2 for name in a})
