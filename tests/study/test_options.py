"""What a typed word and a value of a config mean where an annotation stands."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from modular_experts.experts import Expert
from modular_experts.study.options import SHORT_NAMES, UsageError, full_names, words_of
from modular_experts.study.parser import make


def test_a_factory_gets_its_first_arguments_later() -> None:
    settings = {"class_path": "LoRAExpert", "init_args": {"rank": 3}}
    assert make("--expert", Callable[[torch.Tensor], Expert], settings)(torch.ones(8, 8)).rank == 3


WRONG = [(int, 1.5), (int, True), (list[int], 3), (float, "much"), (str, True), (tuple[int, int], [1])]


@pytest.mark.parametrize(("hint", "value"), WRONG)
def test_a_value_of_another_type_is_refused_by_its_option(hint: Any, value: Any) -> None:
    with pytest.raises(UsageError, match=r"^--x must be of type .*, got ") as refusal:
        make("--x", hint, value)
    assert "\n" not in str(refusal.value)


SPARSE = {"class_path": "SparseExpert", "init_args": {"keep_ratio": 0.1}}
LATER_CONFIGS = [
    ({"a": [1]}, {"a": [2]}, {"a": [2]}),
    ({"a": [1]}, {"a+": [2]}, {"a": [1, 2]}),
    ({"a+": [1]}, {"a+": [2]}, {"a+": [2]}),
    ({"a": {"b": [1], "c": 3}}, {"a": {"b": [2]}}, {"a": {"b": [2], "c": 3}}),
    ({"a": None}, {"a": {"b": 1}}, {"a": {"b": 1}}),
    ({"a": {"b": 1}}, {"a": "file.yaml"}, {"a": "file.yaml"}),
    ({"a": "file.yaml"}, {"a": {"b": 1}}, {"a": {"b": 1}}),
    ({"a": SPARSE}, {"a": {"class_path": "LoRAExpert"}}, {"a": {"class_path": "LoRAExpert"}}),
    ({"a": SPARSE}, {"a": {"row": 2}}, {"a": {**SPARSE, "init_args": {"keep_ratio": 0.1, "row": 2}}}),
    ({"a": SPARSE}, {"a": {"keep_ratio": 0.2}}, {"a": {**SPARSE, "init_args": {"keep_ratio": 0.2}}}),
    ({"a": "SparseExpert"}, {"a": {"init_args": {"keep_ratio": 0.1}}}, {"a": SPARSE}),
    ({"a": {"keep_ratio": 0.3}}, {"a": SPARSE}, {"a": SPARSE}),
    # A group of the usual class, which another config gives to a class of its own.
    ({"a": {"b": 1}}, {"a": {"class_path": "M"}}, {"a": {"class_path": "M", "init_args": {"b": 1}}}),
]


@pytest.mark.parametrize(("earlier", "later", "both"), LATER_CONFIGS)
def test_a_config_lies_over_the_one_before_it(earlier: Any, later: Any, both: Any) -> None:
    (word,) = words_of([("config", earlier), ("config", later)])
    assert json.loads(word.removeprefix("--config=")) == both


def test_a_list_that_is_typed_replaces_the_one_of_a_config() -> None:
    first, typed, last = words_of([("config", {"a": {"b": [1], "c": 3}}), ("a.b", "[2]"), ("config", {"a": {"c": 4}})])
    assert json.loads(first.removeprefix("--config=")) == {"a": {"c": 3}}
    assert (typed, last) == ("--a.b=[2]", '--config={"a": {"c": 4}}')


def test_settings_stand_under_their_full_names_and_those_beside_a_class_among_its_own() -> None:
    config = {"x-common": {}, "base": "b", "expert": {"class_path": "LoRAExpert", "rank": 3}}
    expert = {"class_path": "LoRAExpert", "init_args": {"rank": 3}}
    assert full_names(config, SHORT_NAMES) == {"model": {"base": "b", "expert": expert}}
    with pytest.raises(UsageError, match="gives one option twice: base and "):
        full_names({"base": "a", "model": {"base": "b"}}, SHORT_NAMES)
