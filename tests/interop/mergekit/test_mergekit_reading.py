import pytest

from modular_experts.interop.mergekit.places import Place
from modular_experts.interop.mergekit.reading import read_configuration
from modular_experts.interop.mergekit.references import ModelPath, Reference, read_reference

TIES = """
merge_method: ties
base_model: base
models:
  - model: a
    parameters: {weight: 0.5, density: [0.2, 0.8]}
  - model: b
    parameters:
      weight: [{filter: mlp, value: 0.25}]
parameters: {weight: 2.0, normalize: false}
dtype: float32
"""
Q, MLP = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"
A, B = Reference(ModelPath("a")), Reference(ModelPath("b"))


def read(tmp_path, text):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return read_configuration(file)


def test_nearest_level_that_has_a_value_for_the_weight_counts(tmp_path):
    recipe, middle = read(tmp_path, TIES), Place(0, 0.5)
    assert recipe.each("weight", Q, middle, A) == 0.5
    assert recipe.each("weight", MLP, middle, B) == 0.25
    assert recipe.each("weight", Q, middle, B) == 2.0  # no filter of b's own fits
    assert recipe.each("density", Q, middle, A) == 0.5
    assert recipe.each("density", Q, middle, B) == 1.0
    assert recipe.overall("normalize", Q, middle) == 0
    assert recipe.overall("lambda", Q, middle) == 1


def test_model_comes_before_slice_before_module_before_recipe(tmp_path):
    levels = """
merge_method: linear
modules:
  default:
    slices:
      - sources:
          - {model: a, layer_range: [0, 2], parameters: {weight: [{filter: q_proj, value: 1}]}}
          - {model: b, layer_range: [0, 2]}
        parameters: {weight: [{filter: self_attn, value: 2}]}
      - sources: [{model: a, layer_range: [2, 4]}, {model: b, layer_range: [2, 4]}]
    parameters: {weight: [{filter: layers, value: 3}]}
parameters: {weight: 4}
"""
    recipe = read(tmp_path, levels)
    k_proj, norm = Q.replace("q_proj", "k_proj"), "model.norm.weight"
    found = [recipe.each("weight", name, Place(0, 0), A) for name in (Q, k_proj, MLP, norm)]
    assert found == [1, 2, 3, 4]
    assert recipe.each("weight", Q, Place(0, 0), B) == 2
    assert recipe.each("weight", Q, Place(1, 0), A) == 3
    assert [part.layers for part in recipe.slices] == [(0, 2), (2, 4)]


def test_base_is_added_to_models_where_it_is_not_listed(tmp_path):
    assert [str(model) for model in read(tmp_path, TIES).models] == ["a", "b", "base"]
    listed = TIES.replace("models:", "models:\n  - model: base")
    assert [str(model) for model in read(tmp_path, listed).models] == ["base", "a", "b"]
    assert read(tmp_path, listed).experts == (A, B)


def test_missing_weight_is_told_with_model_and_name(tmp_path):
    recipe = read(tmp_path, TIES.replace("weight: 2.0, ", ""))
    with pytest.raises(ValueError, match=f"nothing gives that of b for {Q}"):
        recipe.each("weight", Q, Place(0, 0), B)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", Reference(ModelPath("a"))),
        ("owner/a@main", Reference(ModelPath("owner/a", "main"))),
        ("a@x+lora/b@y", Reference(ModelPath("a", "x"), ModelPath("lora/b", "y"))),
        ({"model": "a", "lora": {"path": "b", "revision": "y"}}, Reference(ModelPath("a"), ModelPath("b", "y"))),
        ({"model": {"path": "a"}}, Reference(ModelPath("a"))),
    ],
)
def test_reference_is_a_path_with_a_revision_and_an_adapter(text, expected):
    assert read_reference(text, "model") == expected


@pytest.mark.parametrize("text", ["", None, 3, "a@b@c", "a+b+c", "a+", "@x", "a@", {"model": None}, {"lora": "b"}])
def test_what_names_no_model_is_refused(text):
    with pytest.raises(ValueError, match="model"):
        read_reference(text, "model")


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
        (LINEAR + "merge_methods: ties", "unknown key 'merge_methods'.*did you mean merge_method?"),
        (LINEAR.replace("weight", "wieght"), r"models\[0\].parameters has an unknown key 'wieght'.*mean weight\?"),
        (LINEAR + "parameters: {density: 0.5}", "parameters has an unknown key 'density'"),
        (LINEAR.replace("{model: b", "{modle: b"), r"models\[1\] has an unknown key 'modle'.*mean model\?"),
        (LINEAR.replace("linear", "lineer"), "no merge_method 'lineer'; did you mean linear?"),
        (LINEAR.replace("linear", "passthrough"), "passthrough is not supported: it stacks layers"),
        (LINEAR.replace("merge_method: linear\n", ""), "has no merge_method"),
        (LINEAR.replace("linear", "ties"), "ties needs a base_model"),
        (LINEAR + "dtype: float31", "dtype must be one of float32, bfloat16, float16, got 'float31'"),
        (LINEAR + "dtype: int64", "dtype must be one of"),
        (LINEAR + "tokenizer_source: union", "a union of tokenizers is not supported"),
        (LINEAR + "tokenizer: {tokens: {x: {source: a}}}", "tokenizer.tokens is not supported"),
        (LINEAR + "tokenizer: {pad_to_multiple_of: 8}", "tokenizer.pad_to_multiple_of is not supported"),
        (LINEAR + "tokenizer_source: a", "the tokenizer must be that of base_model, got 'a'"),
        (LINEAR + "chat_template: auto", "chat_template is not supported"),
        (LINEAR + "---\n" + LINEAR, "has 2 documents; only one merge"),
        ("[1, 2]", "must be a mapping"),
        ("merge_method: [", "is not valid YAML"),
        (LINEAR + "merge_method: ties", "the key 'merge_method' comes twice"),
        (LINEAR + "slices: [1]", "exactly one of models, slices and modules must be given, got models and slices"),
        ("merge_method: linear", "exactly one of .* got none of them"),
        (
            "base_model: a\ngate_mode: hidden\nexperts: []",
            "a mixture of experts .mergekit-moe., which",
        ),
        (LINEAR.replace("model: b", "model: a"), "names a twice"),
        (
            LINEAR.replace("weight: 1", "normalize: 1"),
            "normalize is a parameter of the whole merge",
        ),
        (
            LINEAR.replace("linear", "slerp").replace("{weight: 1}", "{}") + "base_model: c",
            "slerp takes 1 model.* got 2",
        ),
        (LINEAR.replace("{weight: 1}", "{weight: {filter: x, value: 1}}"), "is a mapping by itself"),
        (SLICES.replace("[2, 4]", "[3, 4]"), r"slices\[1\] starts with layer 3 where layer 2 is next"),
        (SLICES.replace("[0, 2]", "[1, 2]"), r"slices\[0\] starts with layer 1 where layer 0 is next"),
        (SLICES.replace("b, layer_range: [2, 4]", "c, layer_range: [2, 4]"), r"slices\[1\] has other sources"),
        (SLICES.replace("b, layer_range: [2, 4]", "b, layer_range: [1, 3]"), "have different layer_range"),
        (SLICES.replace("b, layer_range: [2, 4]", "b"), "layer_range must be .first, end. of layers.*got None"),
        (SLICES + "base_model: c", "base_model c must be among the sources"),
        (
            SLICES.replace("]}]", "]}], residual_weight: 0.5", 1).replace("- sources", "- sources"),
            "YAML|residual_weight",
        ),
        ("merge_method: linear\nmodules: {vision: {models: [{model: a}]}}", "modules names vision"),
    ],
)
def test_what_cannot_be_run_as_meant_is_refused_in_a_sentence(tmp_path, text, told):
    with pytest.raises(ValueError, match=told) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_missing_file_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no recipe"):
        read_configuration(tmp_path / "none.yaml")


def test_yaml_cannot_make_objects(tmp_path):
    with pytest.raises(ValueError, match="is not valid YAML"):
        read(tmp_path, "merge_method: !!python/object/apply:os.getcwd []")
