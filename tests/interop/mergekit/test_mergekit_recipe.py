"""What a recipe's file may hold, which of its values counts for a weight, and which of our methods gets it."""

import math

import pytest
import torch

from modular_experts.deltas import Dense, Sparse
from modular_experts.interop.mergekit import recipe as mergekit_recipe
from modular_experts.interop.mergekit.recipe import layer_shares, parse_rules, read_recipe, sparse_difference, value_at
from modular_experts.methods import Average, ModelStock, TaskArithmetic

LEVELS = """
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


def read(tmp_path, text):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return read_recipe(file)


def at(value, name, share):
    return value_at(parse_rules(value, "weight"), name, share)


def test_gradient_is_straight_lines_between_its_numbers():
    for numbers, share, expected in [
        ([0, 1], 0.25, 0.25),
        ([0, 1, 0], 0.5, 1.0),
        ([0, 1, 0], 0.75, 0.5),
        ([2, 4, 10], 2 / 3, 6.0),  # a third of the way from 4 to 10
        ([1, 5], 1.0, 5.0),
        ([7], 0.4, 7.0),
        (0.3, 0.9, 0.3),
        ("1e-5", 0.0, 1e-5),  # YAML gives a number without a point as text
        (True, 0.0, 1.0),
    ]:
        assert math.isclose(at(numbers, Q, share), expected)


def test_first_filter_that_is_part_of_the_name_counts():
    first, second = {"filter": "self_attn", "value": [0, 1]}, {"filter": "q_proj", "value": 9}
    value = [first, second, {"filter": "mlp", "value": 0.5}]
    assert (at(value, Q, 0.5), at(value, MLP, 0.5), at(value, "model.norm.weight", 0.5)) == (0.5, 0.5, None)
    for everything in ({"filter": "*", "value": 3}, {"filter": None, "value": 3}, {"value": 3}):
        value = [{"filter": "mlp", "value": 1}, everything, {"filter": "q_proj", "value": 2}]
        assert (at(value, MLP, 0), at(value, Q, 0)) == (1, 3)
    assert at([{"filter": r".*q_proj.*", "value": 1}], Q, 0) is None  # not a regular expression


def test_nearest_level_that_has_a_value_for_the_weight_counts(tmp_path):
    recipe, middle = read(tmp_path, LEVELS), 0.5
    assert recipe.value("weight", Q, middle, "a") == 0.5
    assert recipe.value("weight", MLP, middle, "b") == 0.25
    assert recipe.value("weight", Q, middle, "b") == 2.0  # no filter of b's own fits
    assert recipe.value("density", Q, middle, "a") == 0.5
    assert recipe.value("density", Q, middle, "b") == 1.0
    assert recipe.value("normalize", Q, middle) == 0
    assert recipe.value("lambda", Q, middle) == 1
    with pytest.raises(ValueError, match=f"no value of b for {Q}"):
        read(tmp_path, LEVELS.replace("weight: 2.0, ", "")).value("weight", Q, 0, "b")


def test_model_comes_before_slice_before_recipe(tmp_path):
    text = """
merge_method: linear
slices:
  - sources:
      - {model: a, layer_range: [0, 2], parameters: {weight: [{filter: q_proj, value: 1}]}}
      - {model: b, layer_range: [0, 2]}
    parameters: {weight: [{filter: self_attn, value: 2}]}
parameters: {weight: 4}
"""
    recipe = read(tmp_path, text)
    k_proj = Q.replace("q_proj", "k_proj")
    assert [recipe.value("weight", name, 0, "a") for name in (Q, k_proj, MLP)] == [1, 2, 4]
    assert recipe.value("weight", Q, 0, "b") == 2
    assert recipe.layers == 2


def test_base_is_added_to_models_where_it_is_not_listed(tmp_path):
    assert list(read(tmp_path, LEVELS).models) == ["a", "b", "base"]
    listed = LEVELS.replace("models:", "models:\n  - model: base")
    assert list(read(tmp_path, listed).models) == ["base", "a", "b"]
    assert read(tmp_path, listed).merged == ["a", "b"]


UPS = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(5)]
NAMES = ["model.embed_tokens.weight", *UPS, "model.norm.weight", "lm_head.weight"]


def test_layers_count_from_zero_to_one_and_all_else_stands_at_zero():
    assert list(layer_shares(NAMES).values()) == [0, 0, 0.25, 0.5, 0.75, 1, 0, 0]
    inner = [f"model.layers.{layer}.mlp.experts.{expert}.w1.weight" for layer in range(3) for expert in range(2)]
    assert list(layer_shares(inner).values()) == [0, 0, 0.5, 0.5, 1, 1]
    assert layer_shares(["model.layers.0.w"], 1) == {"model.layers.0.w": 1}
    with pytest.raises(ValueError, match="ends at 4, and the models have 5 layers"):
        layer_shares(NAMES, 4)


@pytest.fixture
def step(tmp_path):
    def of(recipe, entries=100):
        parsed = read(tmp_path, "base_model: base\nmodels: [{model: a}, {model: b}]\n" + recipe)
        return parsed.method_for(MLP, 0, entries)

    return of


def test_counts_are_mergekits_also_where_a_product_of_floats_falls_short(step):
    assert 0.29 * 100 < 29
    kept = step("merge_method: ties\nparameters: {weight: 1, density: 0.29}")
    assert kept.keep == [28 / 100] * 2
    band = step("merge_method: breadcrumbs\nparameters: {weight: 1, density: 0.29, gamma: 0.29}")
    assert band.gamma == [28 / 100] * 2
    assert band.beta == [44 / 100] * 2


def test_weights_that_cancel_are_not_divided_by(step):
    cancel = "parameters: {normalize: true, weight: [1.0e-9]}"
    assert isinstance(step(f"merge_method: task_arithmetic\n{cancel}"), TaskArithmetic)
    assert not step(f"merge_method: dare_linear\n{cancel}").normalise
    assert isinstance(step(f"merge_method: task_arithmetic\n{cancel}".replace("e-9", "e-3")), Average)


def test_nuslerp_and_model_stock_are_ours_with_the_preset_of_mergekit(step):
    nuslerp = "merge_method: nuslerp\nparameters: {weight: 0.25, nuslerp_flatten: %s, nuslerp_row_wise: %s}"
    for flatten, row_wise, expected in [(1, 1, (False, False)), (0, 0, (True, False)), (0, 1, (False, True))]:
        method = step(nuslerp % (flatten, row_wise))
        assert (method.row_wise, method.column_wise) == expected
        assert (method.weights, method.preset) == ([0.25, 0.25], "mergekit")
    assert step(nuslerp.replace("0.25", "[1.0e-9]") % (1, 0)).weights is None
    stock = "merge_method: model_stock\nparameters: {filter_wise: %s}"
    assert step(stock % "true") == ModelStock(row_wise=True, preset="mergekit")
    assert step(stock % "false") == ModelStock(preset="mergekit")


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)], ids=str)
def test_a_difference_is_exact_and_held_by_entries_where_few_moved(dtypes):
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(40, 30, generator=draw).to(dtypes[1])
    for share, form in ((0.05, Sparse), (0.3, Dense)):
        changed = torch.rand(40, 30, generator=draw) < share
        tuned = torch.where(changed, start.double() + 0.5, start.double()).to(dtypes[0])
        found = sparse_difference(tuned, start)
        assert (type(found), found.dtype) == (form, torch.float32)
        assert torch.equal(found.dense(), (tuned.double() - start.double()).float())
    assert sparse_difference(torch.tensor(2.0), torch.tensor(0.5)).dense().item() == 1.5
    assert sparse_difference(start, start).is_empty


def test_model_is_a_path_with_a_revision_and_nothing_else():
    for text in ("a", "owner/a@main"):
        assert mergekit_recipe.parse_model(text, "model") == text
    for wrong in ["", None, 3, "a@b@c", "a+b", "@x", "a@", {"model": "a", "lora": "b"}]:
        with pytest.raises(ValueError, match="model must be a checkpoint"):
            mergekit_recipe.parse_model(wrong, "model")


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
SLERP = LINEAR.replace("linear", "slerp").replace("{weight: 1}", "{}") + "base_model: c"
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
        (SLERP, "slerp takes 1 model.* got 2"),
        (SLICE.replace("[0, 4]", "[1, 4]"), r"layer_range must be \[0, number of layers\], got \[1, 4\]"),
        (SLICE.replace("b, layer_range: [0, 4]", "b, layer_range: [1, 5]"), "run mergekit to cut, repeat or mix lay"),
        (SLICE + SLICE.splitlines()[-1], "slices must be one slice of all layers"),
        (SLICE + "base_model: c\n", "base_model c must be among the sources of the slice"),
        (SLICE + "    residual_weight: 0.5\n", "the key 'residual_weight'"),
        ("merge_method: !!python/object/apply:os.getcwd []", "is not valid YAML"),
    ],
)
def test_recipe_that_cannot_run_as_meant_is_refused_in_a_sentence(tmp_path, text, told):
    with pytest.raises(ValueError, match=told) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value).removesuffix(str(caught.value) if "!!" in text else "")
    with pytest.raises(FileNotFoundError, match="No such file"):
        read_recipe(tmp_path / "none.yaml")
