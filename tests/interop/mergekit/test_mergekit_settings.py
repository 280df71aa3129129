import math

import pytest

from modular_experts.interop.mergekit.places import Place, places
from modular_experts.interop.mergekit.settings import read_setting

Q, MLP = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("numbers", "place", "expected"),
    [
        ([0, 1], 0.25, 0.25),
        ([0, 1, 0], 0.5, 1.0),
        ([0, 1, 0], 0.75, 0.5),
        ([2, 4, 10], 2 / 3, 6.0),  # a third of the way from 4 to 10
        ([1, 5], 1.0, 5.0),
        ([7], 0.4, 7.0),
        (0.3, 0.9, 0.3),
        ("1e-5", 0.0, 1e-5),  # YAML gives a number without a point as text
        (True, 0.0, 1.0),
    ],
)
def test_gradient_is_straight_lines_between_its_numbers(numbers, place, expected):
    assert math.isclose(read_setting(numbers, "weight").at(Q, place), expected)


def test_first_filter_that_is_part_of_the_name_counts():
    setting = read_setting(
        [{"filter": "self_attn", "value": [0, 1]}, {"filter": "q_proj", "value": 9}, {"filter": "mlp", "value": 0.5}],
        "weight",
    )
    assert setting.at(Q, 0.5) == 0.5
    assert setting.at(MLP, 0.5) == 0.5
    assert setting.at("model.norm.weight", 0.5) is None


@pytest.mark.parametrize("everything", [{"filter": "*", "value": 3}, {"filter": None, "value": 3}, {"value": 3}])
def test_entry_without_a_filter_is_for_every_weight(everything):
    setting = read_setting([{"filter": "mlp", "value": 1}, everything, {"filter": "q_proj", "value": 2}], "weight")
    assert (setting.at(MLP, 0), setting.at(Q, 0)) == (1, 3)


def test_filter_is_no_regular_expression():
    assert read_setting([{"filter": r".*q_proj.*", "value": 1}], "weight").at(Q, 0) is None


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"filter": "mlp", "value": 1}, "weight is a mapping by itself, on which mergekit stops"),
        ([], "empty list"),
        (None, "must be a finite number"),
        ("much", "must be a finite number, a list of them, or a list of filters, got 'much'"),
        ([0.1, math.inf], "must be a finite number"),
        ([0.1, {"value": 1}], r"weight\[0\] must be a mapping with filter and value like the other entries, got 0.1"),
        ([{"filtre": "mlp", "value": 1}], r"weight\[0\] has an unknown key 'filtre'.*did you mean filter\?"),
        ([{"filter": "mlp"}], r"weight\[0\] has no value"),
        ([{"filter": 3, "value": 1}], "must be a part of a weight's name, got 3"),
        ([{"filter": "mlp", "value": [{"value": 1}]}], r"weight\[0\].value must be a finite number"),
    ],
)
def test_what_is_no_setting_is_refused_in_a_sentence(value, told):
    with pytest.raises(ValueError, match=told):
        read_setting(value, "weight")


NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(5)),
    "model.norm.weight",
    "lm_head.weight",
]


def test_layers_are_counted_from_zero_to_one_and_all_else_stands_at_zero():
    assert [place.share for place in places(NAMES, [None]).values()] == [0, 0, 0.25, 0.5, 0.75, 1, 0, 0]


def test_each_slice_counts_its_own_layers_and_one_layer_alone_stands_at_one():
    found = places(NAMES, [(0, 3), (3, 4), (4, 5)])
    expected = [(0, 0), (0, 0), (0, 0.5), (0, 1), (1, 1), (2, 1), (2, 0), (2, 0)]
    assert list(found.values()) == [Place(number, share) for number, share in expected]


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("transformer.wte.weight", 0),
        ("wpe.weight", 0),
        ("gpt_neox.embed_in.weight", 0),
        ("model.embed_tokens.weight", 0),
        ("embed_out.weight", 1),
        ("lm_head.weight", 1),
        ("transformer.ln_f.bias", 1),
    ],
)
def test_embeddings_belong_to_the_first_slice_and_the_head_to_the_last(name, number):
    layers = ["transformer.h.0.attn.weight", "transformer.h.1.attn.weight"]
    assert places([name, *layers], [(0, 1), (1, 2)])[name] == Place(number, 0)


def test_number_of_an_inner_expert_is_not_taken_for_the_layer():
    names = [f"model.layers.{layer}.mlp.experts.{expert}.w1.weight" for layer in range(3) for expert in range(2)]
    assert [place.share for place in places(names, [None]).values()] == [0, 0, 0.5, 0.5, 1, 1]


def test_slices_must_reach_the_last_layer():
    with pytest.raises(ValueError, match="end before layer 4 and the models have 5 layers"):
        places(NAMES, [(0, 2), (2, 4)])
