"""What a recipe's file may hold, and the sentences for all else."""

import pytest

from modular_experts.interop.mergekit.parse import parse_reference, parse_setting, read_recipe
from modular_experts.interop.mergekit.recipe import ModelReference


def read(tmp_path, text):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return read_recipe(file)


def test_model_is_a_path_with_a_revision_and_an_adapter():
    with_adapter = ModelReference("a", "x", ModelReference("lora/b", "y"))
    for text, expected in [
        ("a", ModelReference("a")),
        ("owner/a@main", ModelReference("owner/a", "main")),
        ("a@x+lora/b@y", with_adapter),
        ({"model": {"path": "a", "revision": "x"}, "lora": "lora/b@y"}, with_adapter),
        ({"model": "a@x", "lora": {"path": "lora/b", "revision": "y"}}, with_adapter),
    ]:
        assert parse_reference(text, "model") == expected
    assert str(with_adapter) == "a@x+lora/b@y"
    for wrong in ["", None, 3, "a@b@c", "a+b+c", "a+", "@x", "a@", {"model": None}, {"lora": "b"}]:
        with pytest.raises(ValueError, match="model"):
            parse_reference(wrong, "model")


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (
            {"filter": "mlp", "value": 1},
            "must be a finite number, .* got {'filter'",
        ),
        ("much", "must be a finite number, a list of them, or a list of filters, got 'much'"),
        ([0.1, {"value": 1}], r"weight\[0\] must be a mapping of keys to values, got 0.1"),
        ([{"filter": 3, "value": 1}], "must be a part of a weight's name, got 3"),
        ([{"filter": "mlp", "value": [{"value": 1}]}], r"weight\[0\].value must be a finite number"),
    ],
)
def test_value_that_mergekit_would_not_take_is_refused_in_a_sentence(value, told):
    with pytest.raises(ValueError, match=told):
        parse_setting(value, "weight")


LINEAR = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]\n"
SLICES = """merge_method: linear
parameters: {weight: 1}
slices:
  - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]
  - sources: [{model: a, layer_range: [2, 4]}, {model: b, layer_range: [2, 4]}]
"""


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (LINEAR + "merge_methods: ties", "key 'merge_methods'.*did you mean merge_method?"),
        (LINEAR.replace("linear", "lineer"), "merge_method 'lineer' is not supported; did you mean linear?"),
        (LINEAR.replace("linear", "ties"), "ties needs a base_model"),
        (LINEAR + "dtype: float31", "dtype must be one of float32, bfloat16, float16, got 'float31'"),
        (LINEAR + "tokenizer_source: union", "the tokenizer must be that of base_model, got 'union'"),
        (LINEAR + "---\n" + LINEAR, "is not valid YAML: expected a single document"),
        ("merge_method: linear", "must have exactly one of models, slices and modules"),
        (LINEAR.replace("model: b", "model: a"), "names a twice"),
        (f"{LINEAR}merge_method: ties\n", "the key 'merge_method' comes twice"),
        (
            LINEAR.replace("linear", "slerp").replace("{weight: 1}", "{}") + "base_model: c",
            "slerp takes 1 model.* got 2",
        ),
        (
            SLICES.replace("[2, 4]", "[3, 4]"),
            r"slices\[1\] must have a layer_range \[2, end\] .* got \[3, 4\]",
        ),
        (SLICES.replace("b, layer_range: [2, 4]", "c, layer_range: [2, 4]"), r"slices\[1\] has other sources"),
        (SLICES.replace("b, layer_range: [2, 4]", "b, layer_range: [1, 3]"), "have different layer_range"),
        (SLICES + "base_model: c", "base_model c must be among the sources"),
        (SLICES.replace("]}]\n", "]}]\n    residual_weight: 0.5\n", 1), "unsupported key 'residual_weight'"),
    ],
)
def test_recipe_that_cannot_run_as_meant_is_refused_in_a_sentence(tmp_path, text, told):
    with pytest.raises(ValueError, match=told) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_missing_file_and_yaml_that_makes_objects_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="was not found"):
        read_recipe(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="is not valid YAML"):
        read(tmp_path, "merge_method: !!python/object/apply:os.getcwd []")
