"""Several experts are opened together: patterns, and experts that do not fit."""

import os

import pytest
import torch
from testbed.random_deltas import random_delta

from modular_experts.deltas import Sparse
from modular_experts.library import make_record, open_expert, open_experts, write_expert
from modular_experts.library.record import MERGE
from modular_experts.merging.interference import interference
from modular_experts.merging.merged import merge
from modular_experts.merging.route import route
from modular_experts.methods import Average
from modular_experts.routing import Oracle

BASE = {"id": "base", "revision": None, "fingerprint": "f" * 64}


@pytest.fixture(autouse=True)
def library(tmp_path, monkeypatch):
    """The experts a, b and c, the merge `both` of a and b, and the route `found` over them."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("abc"):
        delta = random_delta("Sparse", (8, 6), seed, torch.float32, share=0.2)
        write_expert(f"library/{name}", [("w", delta)], make_record("SparseExpert", BASE, tasks=[name]))
    merge(["library/a", "library/b"], Average(), "library/both")
    route(["library/a", "library/b"], "library/found", Oracle())
    (tmp_path / "library/notes.txt").write_text("no expert")
    return tmp_path / "library"


def names(*words: str, **settings: object) -> list[str]:
    return [expert.name for expert in open_experts(list(words), **settings)]


def test_a_pattern_leaves_out_merges_and_routes_that_no_word_names(caplog) -> None:
    assert open_expert("library/both").record["kind"] == MERGE
    assert names("library/*") == ["a", "b", "c"]
    assert caplog.messages == [
        "library/* leaves out library/both, library/found, which consist of other experts; name what you want among "
        "them beside the pattern"
    ]
    assert names("library/*", "library/both") == ["a", "b", "c", "both"]
    assert names("library/c", "library/[a-c]") == ["c", "a", "b"]
    assert names("library/*", mergeable=False) == ["a", "b", "both", "c", "found"]
    with pytest.raises(ValueError, match=r"library/x\* matches no expert"):
        open_experts("library/x*")


def test_a_merge_takes_a_pattern_and_the_next_one_does_not_contain_the_first() -> None:
    first = merge(["library/*"], Average(), "library/all")
    assert merge(["library/*"], Average(), "library/all", overwrite=True).content_hash == first.content_hash
    assert [parent["name"] for parent in first.record["parents"]] == ["a", "b", "c"]
    os.rename("library/b", "library/[b]")
    with pytest.raises(ValueError, match="cannot be the name of an expert"):
        open_experts(["library/[b]"])  # a place that is there is no pattern


def test_all_experts_that_do_not_fit_are_named_or_left_out(caplog) -> None:
    write_expert(
        "library/odd", [], make_record("X", BASE, not_mergeable_because="it has a gate"), state={"w/x": torch.ones(1)}
    )
    listed = ["library/a", "library/found", "library/b", "library/odd"]
    with pytest.raises(ValueError, match=r"2 of 4 experts cannot be used: .*its router.*it has a gate") as refused:
        merge(listed, Average(), "library/left")
    assert str(refused.value).endswith("Leave them out with `skip=True`")
    left = merge(listed, Average(), "library/left", skip=True)
    assert [parent["name"] for parent in left.record["parents"]] == ["a", "b"]
    assert [message.partition(" is left out: ")[0] for message in caplog.messages] == [listed[1], listed[3]]
    assert (
        caplog.messages[1]
        == f"{listed[3]} is left out: odd cannot be merged or added to its base, because it has a gate"
    )
    assert interference(listed, skip=True).experts == ["a", "b"]
    with pytest.raises(ValueError, match="2 of 2 experts"):
        merge(["library/found", "library/odd"], Average(), "library/left", overwrite=True, skip=True)
    # A place that is not there is a slip of the user.
    with pytest.raises(FileNotFoundError, match="library/d is not an expert"):
        merge(["library/a", "library/d"], Average(), "library/more", skip=True)


def test_task_vectors_stay_where_they_are_in_the_list() -> None:
    half = 0.5 * open_expert("library/a")
    opened = open_experts(["library/b", half, open_expert("library/c")])
    assert opened[1] is half
    assert [expert.title for expert in opened] == ["b", half.title, "c"]
    assert isinstance(opened[0]["w"], Sparse)
