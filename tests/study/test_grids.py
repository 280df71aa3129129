"""Kinds of a grid and of each seed are spelt out, and what was measured before there were any stays."""

import pytest

from modular_experts.study.short_forms import each_method, for_seed, kinds_of


def test_a_grid_makes_a_kind_of_each_combination_and_its_name_means_all() -> None:
    grid = {"learning_rate": [0.001, 0.01], "expert.init_args.rank": [4, 8]}
    found = kinds_of({"lora": {"expert": "LoRAExpert", "steps": 5, "grid": grid}, "full": "full.yaml"})
    assert [*found.apart] == ["lora-0.001-4", "lora-0.001-8", "lora-0.01-4", "lora-0.01-8", "full"]
    own = {"expert": "LoRAExpert", "steps": 5}
    assert found.apart["lora-0.01-4"] == [own, {"learning_rate": 0.01}, {"expert": {"init_args": {"rank": 4}}}]
    assert found.apart["full"] == "full.yaml"
    assert found.named["lora"] == [*found.apart][:4]
    assert found.named["lora-0.01-4"] == ["lora-0.01-4"]


def test_a_joint_kind_has_its_grid_too_and_is_in_no_merge() -> None:
    shapes = {"model.scheduler": ["WarmupLinear", {"class_path": "mine.Steps", "init_args": {"every": 3}}]}
    found = kinds_of({"molora": {"joint": True, "expert": "MoLoRAExpert", "grid": shapes}})
    assert [*found.joint] == ["molora-WarmupLinear", "molora-mine.Steps"]
    assert not found.apart
    assert not found.named


def test_values_of_a_grid_may_have_names() -> None:
    found = kinds_of({"sparse": {"grid": {"trainer.callbacks": {"once": [1], "grow": [2, 3]}, "steps": [5]}}})
    assert [*found.apart] == ["sparse-once-5", "sparse-grow-5"]
    assert found.apart["sparse-grow-5"] == [{}, {"trainer": {"callbacks": [2, 3]}}, {"steps": 5}]


def test_two_kinds_of_one_name_are_refused() -> None:
    shapes = [{"class_path": "LoRAExpert", "init_args": {"rank": rank}} for rank in (4, 8)]
    with pytest.raises(ValueError, match="would be called lora-LoRAExpert; give the values of the grid of lora names"):
        kinds_of({"lora": {"grid": {"expert": shapes}}})
    with pytest.raises(ValueError, match="two kinds of experts would be called lora-5"):
        kinds_of({"lora": {"grid": {"steps": [5]}}, "lora-5": {"steps": 9}})
    assert [*kinds_of({"lora": {"grid": {"expert": {"a": shapes[0], "b": shapes[1]}}}}).apart] == ["lora-a", "lora-b"]


@pytest.mark.parametrize("grid", [["0.1"], {"learning_rate": 0.1}, {"learning_rate": []}])
def test_a_grid_without_lists_of_values_is_refused(grid) -> None:
    with pytest.raises(ValueError, match=r"experts\.lora\.grid is .*; give lists of values"):
        kinds_of({"lora": {"expert": "LoRAExpert", "grid": grid}})


def test_a_seed_stands_in_words_and_as_a_number() -> None:
    given = {"base": "runs/{seed}/base", "source": {"init_args": {"seed": "{seed}"}}, "kept": [1, None, "{seed}"]}
    assert for_seed(given, 3) == {"base": "runs/3/base", "source": {"init_args": {"seed": 3}}, "kept": [1, None, 3]}


def test_an_entry_with_several_methods_stands_for_an_entry_each() -> None:
    entries = ["IsoC", {"method": ["TIES", {"class_path": "SVC"}], "tune": True}, {"route": "Arrow"}]
    ties, svc = ({"method": method, "tune": True} for method in ("TIES", {"class_path": "SVC"}))
    assert [*each_method(entries)] == ["IsoC", ties, svc, {"route": "Arrow"}]
