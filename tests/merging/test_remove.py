"""A linear merge without one of its experts is the merge of the others."""

import pytest
import torch
from testbed.random_deltas import random_delta

from modular_experts.__main__ import main
from modular_experts.library import make_record, open_expert, write_expert
from modular_experts.library.form import Form
from modular_experts.merging.merged import merge
from modular_experts.merging.remove import remove
from modular_experts.merging.shrink import write_form
from modular_experts.methods import TIES, Average, TaskArithmetic

BASE = {"id": "base", "revision": None, "fingerprint": "a" * 64}
SHAPES = {"a.weight": (12, 15), "b.weight": (9, 9)}


def make(path, form, seed, names=tuple(SHAPES)):
    deltas = [(name, random_delta(form, SHAPES[name], seed, torch.float32, share=0.3)) for name in names]
    write_expert(path, deltas, make_record("X", BASE, tasks=[path.name]))


@pytest.mark.parametrize(
    ("forms", "method"),
    [
        (["Sparse"] * 3, Average(weights=[1.0, 3.0, -0.5], scale=2.0)),
        (["Sparse", "Dense", "LowRank"], TaskArithmetic(0.3, [2.0, 1.0, 0.5])),
    ],
    ids=str,
)
def test_result_is_the_merge_of_the_others(tmp_path, forms, method):
    library, names = tmp_path, ["one", "two", "three"]
    for seed, (name, form) in enumerate(zip(names, forms, strict=True)):
        make(library / name, form, seed, list(SHAPES)[: 1 + (name != "two")])
    merge([library / name for name in names], method, library / "all")
    for place, name in enumerate(names):
        left = remove(library / "all", library / name, library / f"without-{name}")
        rest = [other for other in names if other != name]
        weights = method.weights and [w for number, w in enumerate(method.weights) if number != place]
        without = type(method)(weights=weights, scale=method.scale)
        again = merge([library / other for other in rest], without, library / f"again-{name}")
        for weight in again:
            torch.testing.assert_close(left[weight].dense(), again[weight].dense(), rtol=2e-5, atol=1e-5)
            if forms[0] == forms[-1] == "Sparse":
                assert torch.equal(left[weight].indices, again[weight].indices)
        assert [parent["name"] for parent in left.record["parents"]] == rest
        assert left.record["method"] == again.record["method"]
        assert left.record["tasks"] == sorted(rest, key=lambda task: sorted(names).index(task))


def test_a_task_that_another_expert_has_too_stays(tmp_path):
    for seed, (name, tasks) in enumerate({"one": ["a", "b"], "two": ["b"], "three": ["c"]}.items()):
        deltas = [("a.weight", random_delta("Sparse", SHAPES["a.weight"], seed, torch.float32, share=0.3))]
        write_expert(tmp_path / name, deltas, make_record("X", BASE, tasks=tasks))
    merge([tmp_path / name for name in ("one", "two", "three")], Average(), tmp_path / "all")
    assert remove(tmp_path / "all", tmp_path / "one", tmp_path / "left").record["tasks"] == ["b", "c"]
    assert remove(tmp_path / "left", tmp_path / "three", tmp_path / "two-alone").record["tasks"] == ["b"]


def test_what_cannot_be_taken_out_is_refused(tmp_path, capsys):
    for seed, name in enumerate(("one", "two", "three")):
        make(tmp_path / name, "Sparse", seed)
    pair = [tmp_path / "one", tmp_path / "two"]
    merge(pair, TIES(), tmp_path / "ties")
    merge(pair, Average(), tmp_path / "average")
    merge(pair[:1], Average(), tmp_path / "alone")
    merge(pair, None, tmp_path / "patterns", per_weight={"a.*": Average()})
    for merged, expert, sentence in (
        ("ties", "one", "ties is a TIES, and an expert can be taken out of a merge by Average or TaskArithmetic only"),
        ("one", "two", "one is a X, and an expert can be taken out"),
        ("patterns", "one", "merge the others again"),
        ("average", "three", "average was not made of three as it is now, but of one, two"),
        ("alone", "one", "alone was made of one alone, so nothing would be left"),
    ):
        options = ["--merged", str(tmp_path / merged), "--expert", str(tmp_path / expert)]
        assert main(["remove", *options, "--out", str(tmp_path / "out")]) == 1
        assert sentence in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    # Values that were rounded or cut say too little.
    average = open_expert(tmp_path / "average")
    write_form(average, dict(average.items()), Form(), tmp_path / "shrunk")
    for name, form in {"half": Form("bfloat16"), "few": Form(keep=0.5), "rank": Form(rank=2)}.items():
        merge(pair, Average(), tmp_path / name, form=form)
    for name in ("shrunk", "half", "few", "rank"):
        with pytest.raises(ValueError, match=f"{name} is stored in fewer bytes, with rounded or cut values"):
            remove(tmp_path / name, pair[0], tmp_path / "out")


def test_of_two_equal_experts_the_named_one_is_taken_out(tmp_path):
    for seed, name in enumerate(("one", "same", "other")):
        make(tmp_path / name, "Sparse", seed // 2)
    merge([tmp_path / name for name in ("one", "same", "other")], Average(weights=[1.0, 2.0, 3.0]), tmp_path / "all")
    left = remove(tmp_path / "all", tmp_path / "same", tmp_path / "left")
    assert [parent["name"] for parent in left.record["parents"]] == ["one", "other"]
    assert left.record["method"]["init_args"]["weights"] == [1.0, 3.0]
