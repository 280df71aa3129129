"""Which value of a recipe counts for a weight, and which of our methods gets it."""

import math

import pytest
import torch

from modular_experts.deltas import Sparse
from modular_experts.interop.mergekit.inputs import WeightDifference, weight_difference
from modular_experts.interop.mergekit.parse import parse_setting, read_recipe
from modular_experts.interop.mergekit.recipe import LayerPosition, ModelReference, layer_positions, value_at
from modular_experts.methods import TIES, Average, ModelStock, TaskArithmetic
from modular_experts.methods.method import Context

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
A, B = ModelReference("a"), ModelReference("b")


def read(tmp_path, text):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return read_recipe(file)


def at(value, name, share):
    return value_at(parse_setting(value, "weight"), name, share)


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
    value = [
        {"filter": "self_attn", "value": [0, 1]},
        {"filter": "q_proj", "value": 9},
        {"filter": "mlp", "value": 0.5},
    ]
    assert (at(value, Q, 0.5), at(value, MLP, 0.5), at(value, "model.norm.weight", 0.5)) == (0.5, 0.5, None)
    for everything in ({"filter": "*", "value": 3}, {"filter": None, "value": 3}, {"value": 3}):
        value = [{"filter": "mlp", "value": 1}, everything, {"filter": "q_proj", "value": 2}]
        assert (at(value, MLP, 0), at(value, Q, 0)) == (1, 3)
    assert at([{"filter": r".*q_proj.*", "value": 1}], Q, 0) is None  # not a regular expression


def test_nearest_level_that_has_a_value_for_the_weight_counts(tmp_path):
    recipe, middle = read(tmp_path, LEVELS), LayerPosition(0, 0.5)
    assert recipe.value("weight", Q, middle, A) == 0.5
    assert recipe.value("weight", MLP, middle, B) == 0.25
    assert recipe.value("weight", Q, middle, B) == 2.0  # no filter of b's own fits
    assert recipe.value("density", Q, middle, A) == 0.5
    assert recipe.value("density", Q, middle, B) == 1.0
    assert recipe.value("normalize", Q, middle) == 0
    assert recipe.value("lambda", Q, middle) == 1


def test_model_comes_before_slice_before_module_before_recipe(tmp_path):
    text = """
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
    recipe = read(tmp_path, text)
    k_proj, norm = Q.replace("q_proj", "k_proj"), "model.norm.weight"
    found = [recipe.value("weight", name, LayerPosition(0, 0), A) for name in (Q, k_proj, MLP, norm)]
    assert found == [1, 2, 3, 4]
    assert recipe.value("weight", Q, LayerPosition(0, 0), B) == 2
    assert recipe.value("weight", Q, LayerPosition(1, 0), A) == 3
    assert [part.layers for part in recipe.slices] == [(0, 2), (2, 4)]


def test_base_is_added_to_models_where_it_is_not_listed(tmp_path):
    assert [str(model) for model in read(tmp_path, LEVELS).models] == ["a", "b", "base"]
    listed = LEVELS.replace("models:", "models:\n  - model: base")
    assert [str(model) for model in read(tmp_path, listed).models] == ["base", "a", "b"]
    assert read(tmp_path, listed).merged == (A, B)


def test_missing_weight_is_an_error_with_model_and_name(tmp_path):
    recipe = read(tmp_path, LEVELS.replace("weight: 2.0, ", ""))
    with pytest.raises(ValueError, match=f"no value of b for {Q}"):
        recipe.value("weight", Q, LayerPosition(0, 0), B)


NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(5)),
    "model.norm.weight",
    "lm_head.weight",
]


def test_each_slice_counts_its_layers_from_zero_to_one_and_all_else_stands_at_zero():
    assert [position.share for position in layer_positions(NAMES, [None]).values()] == [0, 0, 0.25, 0.5, 0.75, 1, 0, 0]
    expected = [(0, 0), (0, 0), (0, 0.5), (0, 1), (1, 1), (2, 1), (2, 0), (2, 0)]  # one layer alone stands at 1
    found = layer_positions(NAMES, [(0, 3), (3, 4), (4, 5)])
    assert list(found.values()) == [LayerPosition(number, share) for number, share in expected]
    inner = [f"model.layers.{layer}.mlp.experts.{expert}.w1.weight" for layer in range(3) for expert in range(2)]
    assert [position.share for position in layer_positions(inner, [None]).values()] == [0, 0, 0.5, 0.5, 1, 1]
    with pytest.raises(ValueError, match="end before layer 4 and the models have 5 layers"):
        layer_positions(NAMES, [(0, 2), (2, 4)])


def test_embeddings_belong_to_the_first_slice_and_the_head_to_the_last():
    layers = ["transformer.h.0.attn.weight", "transformer.h.1.attn.weight"]
    first = ["transformer.wte.weight", "wpe.weight", "gpt_neox.embed_in.weight", "model.embed_tokens.weight"]
    last = ["embed_out.weight", "lm_head.weight", "transformer.ln_f.bias"]
    found = layer_positions([*first, *last, *layers], [(0, 1), (1, 2)])
    assert [found[name].slice for name in (*first, *last)] == [0] * 4 + [1] * 3


@pytest.fixture
def step(tmp_path):
    def of(recipe, entries=100):
        parsed = read(tmp_path, "base_model: base\nmodels: [{model: a}, {model: b}]\n" + recipe)
        return parsed.step(MLP, LayerPosition(0, 0), entries)[0]

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


def test_ties_gets_every_setting_that_mergekit_means_by_it(step):
    method = step("merge_method: ties\nparameters: {weight: 0.5, lambda: 3, rescale: true}")
    assert isinstance(method, TIES)
    assert (method.scope, method.vote, method.divisor, method.zero) == ("weight", "weighted", "weights", "positive")
    assert (method.keep, method.weights, method.scale, method.rescale) == ([1.0, 1.0], [0.5, 0.5], 3, "l1")


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


SETTINGS = "weight: 0.7, density: 0.6"
PRUNING = dict.fromkeys(["task_arithmetic", "ties", "dare_ties", "breadcrumbs", "della"], SETTINGS)


@pytest.mark.parametrize(("method", "settings"), [*PRUNING.items(), ("sce", "select_topk: 0.3")])
def test_differences_held_entry_by_entry_merge_as_dense_ones_do(step, method, settings):
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(30, 20, generator=draw).bfloat16()
    moved = [torch.rand(start.shape, generator=draw) < 0.08 for _ in range(2)]
    tuned = [torch.where(few, torch.randn(start.shape, generator=draw).bfloat16(), start) for few in moved]
    merge = step(f"merge_method: {method}\nparameters: {{{settings}}}", start.numel()).merge
    sparse = [weight_difference(one, start, torch.float32) for one in tuned]
    dense = [weight_difference(one, start, torch.float32, sparse_up_to=0) for one in tuned]
    assert [type(delta) for delta in (*sparse, *dense)] == [Sparse] * 2 + [WeightDifference] * 2
    merged = merge(sparse, Context(MLP))
    assert not merged.is_empty
    torch.testing.assert_close(merged.dense(), merge(dense, Context(MLP)).dense(), rtol=1e-6, atol=3e-7)
