"""A record leads to classes of this package, wherever they are now, and to classes that the user trusts alone."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from modular_experts.experts.site import LayerPlan
from modular_experts.library.described import describe, find_class, rebuild, short_name, trust
from modular_experts.methods import TIES, KnOTS, MergeMethod
from modular_experts.routing import Router, TopK
from modular_experts.routing.gates import Selection


def test_an_object_comes_back_of_its_description_with_the_objects_inside() -> None:
    method = KnOTS(TIES(keep=0.1), scale=2.0)
    found = json.loads(json.dumps(describe(method)))
    assert found["class_path"].endswith(".KnOTS")
    assert found["init_args"]["inner"]["class_path"] == "modular_experts.methods.ties.TIES"
    assert rebuild(found, MergeMethod) == method


@pytest.mark.parametrize(
    "place", ["modular_experts.merging.ties.", "modular_experts.elsewhere.", "", TIES.__module__ + "."]
)
def test_a_class_that_has_moved_is_found_by_its_name(place: str) -> None:
    assert find_class(f"{place}TIES", MergeMethod) is TIES


def test_the_contract_decides_between_classes_of_one_name() -> None:
    assert find_class("TopK", Selection) is TopK
    assert short_name(TopK) == "TopK"
    for path in (f"{TIES.__module__}.TIES", "pathlib.Path", "modular_experts.library.record.json.JSONDecoder"):
        with pytest.raises(ValueError, match="the record names"):
            find_class(path, Router)


def test_settings_that_a_class_does_not_take_are_told() -> None:
    with pytest.raises(ValueError, match=r"library/x has settings that TIES does not take .*depth"):
        rebuild({"class_path": "TIES", "init_args": {"depth": 1}}, MergeMethod, owner="library/x")


def test_only_what_the_user_trusts_leads_to_foreign_code(tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    Path(tmp_path, "foreign").mkdir()
    Path(tmp_path, "foreign/__init__.py").write_text("")
    imported, defined = f"from {LayerPlan.__module__} import LayerPlan", "class Mine(LayerPlan):"
    Path(tmp_path, "foreign/plans.py").write_text(f"{imported}\n{defined}\n    def __call__(self, sites): ...")
    how = r"if you trust it, add `trust='foreign.plans'`, in Python modular_"
    with pytest.raises(ValueError, match=how):
        find_class("foreign.plans.Mine", LayerPlan)
    assert "foreign" not in sys.modules, "a record must import nothing"
    with pytest.raises(ValueError, match=r"trust: there is no module or class foreign\.other"):
        trust("foreign.other")
    trust("foreign")
    assert find_class("foreign.plans.Mine", LayerPlan).__name__ == "Mine"
    with pytest.raises(ValueError, match="add `trust="):
        find_class("foreign.plans.Mine", Router)


def test_a_class_in_hand_is_trusted_itself_and_never_beats_one_of_this_package() -> None:
    @dataclass(frozen=True)
    class TIES(MergeMethod):
        def merge(self, deltas):
            return deltas[0]

    trust(TIES)
    assert find_class(describe(TIES())["class_path"], MergeMethod) is TIES
    assert find_class("TIES", MergeMethod) is not TIES
