"""What a recipe's file may hold, and the sentences for all else."""

import pytest

from modular_experts.interop.mergekit.recipe import parse_model, parse_rules, read_recipe


def read(tmp_path, text):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return read_recipe(file)


def test_model_is_a_path_with_a_revision_and_nothing_else():
    for text in ("a", "owner/a@main"):
        assert parse_model(text, "model") == text
    for wrong in ["", None, 3, "a@b@c", "a+b", "@x", "a@", {"model": "a", "lora": "b"}]:
        with pytest.raises(ValueError, match="model must be a checkpoint"):
            parse_model(wrong, "model")


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"filter": "mlp", "value": 1}, "must be a number, .* got {'filter'"),
        ("much", "must be a number, a list of them, or a list of filters, got 'much'"),
        ([0.1, {"value": 1}], r"weight\[0\] must be a mapping of keys to values, got 0.1"),
        ([{"filter": "mlp", "value": [{"value": 1}]}], r"weight\[0\].value must be a number"),
    ],
)
def test_value_that_mergekit_would_not_take_is_refused_in_a_sentence(value, told):
    with pytest.raises(ValueError, match=told):
        parse_rules(value, "weight")


LINEAR = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]\n"
SLICE = """merge_method: linear
parameters: {weight: 1}
slices:
  - sources: [{model: a, layer_range: [0, 4]}, {model: b, layer_range: [0, 4]}]
"""


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (LINEAR + "merge_methods: ties", "key 'merge_methods'.*did you mean merge_method?"),
        (LINEAR + "tokenizer: {source: union}", "key 'tokenizer', which is misspelt or needs mergekit itself"),
        (LINEAR.replace("linear", "lineer"), "merge_method 'lineer' is not supported; did you mean linear?"),
        (LINEAR.replace("linear", "passthrough"), "and mergekit runs the others"),
        (LINEAR.replace("linear", "ties"), "ties needs a base_model"),
        (LINEAR + "dtype: float31", "dtype and out_dtype must be one of float32, bfloat16, float16, got 'float31'"),
        (LINEAR + "tokenizer_source: union", "the tokenizer must be the one of base_model, got 'union'; run mergekit"),
        (LINEAR + "---\n" + LINEAR, "is not valid YAML: expected a single document"),
        ("merge_method: linear", "must have exactly one of models and slices"),
        (LINEAR.replace("model: b", "model: a"), "names a twice"),
        (f"{LINEAR}merge_method: ties\n", "the key 'merge_method' comes twice"),
        (LINEAR.replace("model: b", "model: b+lora"), "models.1..model must be a checkpoint"),
        (
            LINEAR.replace("linear", "slerp").replace("{weight: 1}", "{}") + "base_model: c",
            "slerp takes 1 model.* got 2",
        ),
        (SLICE.replace("[0, 4]", "[1, 4]"), r"layer_range must be \[0, number of layers\], got \[1, 4\]"),
        (
            SLICE.replace("b, layer_range: [0, 4]", "b, layer_range: [1, 5]"),
            "run mergekit to cut, repeat or mix layers",
        ),
        (SLICE + SLICE.splitlines()[-1], "slices must be one slice of all layers"),
        (SLICE + "base_model: c\n", "base_model c must be among the sources of the slice"),
        (SLICE + "    residual_weight: 0.5\n", "the key 'residual_weight'"),
    ],
)
def test_recipe_that_cannot_run_as_meant_is_refused_in_a_sentence(tmp_path, text, told):
    with pytest.raises(ValueError, match=told) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_missing_file_and_yaml_that_makes_objects_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="No such file"):
        read_recipe(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="is not valid YAML"):
        read(tmp_path, "merge_method: !!python/object/apply:os.getcwd []")
