"""Stored statistics: they are read as they were written, of this expert and no other, whole or not at all."""

import pytest
import torch
from testbed.random_deltas import random_delta

from modular_experts.deltas import Dense
from modular_experts.library import (
    Library,
    gather_statistics,
    make_record,
    open_expert,
    open_statistics,
    write_expert,
    write_statistics,
)
from modular_experts.library.statistics import StoredStatistics, kinds_of_statistics
from modular_experts.merging.merged import Merged, merge
from modular_experts.methods import Average, Fisher, RegMean, RegMeanPlusPlus
from modular_experts.methods.method import Context, DataStatistic

BASE = {"id": "base", "revision": None, "fingerprint": "a" * 64}
SHAPES = {"a.weight": (7, 10), "b.weight": (6, 9), "c.bias": (5,)}
DATA = {"split": "validation", "tokens": 50}


def make(path, seed, weights=("a.weight", "b.weight", "c.bias")):
    deltas = ((name, random_delta("Dense", SHAPES[name], seed, torch.float32)) for name in weights)
    write_expert(path, deltas, make_record("FullExpert", BASE, tasks=["intents"]))
    return open_expert(path)


def grams(seed, weights=SHAPES):
    draw = torch.Generator().manual_seed(seed)
    for name in weights:
        x = torch.randn(20, SHAPES[name][-1], generator=draw)
        yield name, None if name == "c.bias" else DataStatistic(x.T @ x / 20)


def store(expert, kind="gram", statistics=None, **settings):
    statistics = grams(len(expert.name)) if statistics is None else statistics
    return write_statistics(expert, kind, statistics, {"intents": 20}, DATA, **settings)


@pytest.fixture
def one(tmp_path):
    return make(tmp_path / "one", 1)


@pytest.fixture
def other(tmp_path):
    return make(tmp_path / "another", 2)


def flip(file, place):
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_what_is_written_is_read_and_the_expert_stays_what_it_was(one, tmp_path):
    files = {file: file.read_bytes() for file in one.path.iterdir()}
    written, given = store(one), dict(grams(3))
    stored = open_statistics(one, "gram")
    assert list(stored) == list(SHAPES)
    assert stored["c.bias"] is None
    norm = sum(given[name].values.double().square().sum().item() for name in ("a.weight", "b.weight")) ** 0.5
    for name in ("a.weight", "b.weight"):
        assert torch.equal(stored[name].values, given[name].values)
        assert stored[name].norm == pytest.approx(norm)
    assert stored.facts["tasks"] == {"intents": 20}
    assert stored.facts["data"] == DATA
    assert written.file == one.path / "statistics" / "gram.safetensors"
    assert {file: file.read_bytes() for file in one.path.iterdir() if file.is_file()} == files
    assert open_expert(one.path).content_hash == one.content_hash
    assert list(Library(tmp_path)) == ["one"]
    assert not Library(tmp_path).incomplete()


def test_equal_tensors_are_stored_once(one):
    x = torch.randn(10, 10)
    alone = store(one, statistics=[("a.weight", DataStatistic(x))]).size_on_disk
    twice = [("a.weight", DataStatistic(x)), ("b.weight", DataStatistic(x.clone()))]
    both = store(one, statistics=twice, overwrite=True)
    assert both.size_on_disk < alone + x.nbytes
    assert torch.equal(both["b.weight"].values, x)
    reshaped = store(one, "other", [("a.weight", DataStatistic(x)), ("b.weight", DataStatistic(x.view(5, 20)))])
    assert reshaped["b.weight"].values.shape == (5, 20)


def test_statistics_of_other_contents_are_refused(one, tmp_path):
    store(one)
    kept = (one.path / "statistics/gram.safetensors").read_bytes()
    write_expert(one.path, [("a.weight", one["a.weight"] * 2.0)], one.record, overwrite=True)
    changed = open_expert(one.path)
    assert kinds_of_statistics(changed) == []
    (one.path / "statistics").mkdir()
    (one.path / "statistics/gram.safetensors").write_bytes(kept)
    anew = r"`statistics` with `experts=.*`, `kind='gram'`"
    with pytest.raises(ValueError, match=f"made for other contents .*{anew}"):
        open_statistics(changed, "gram")
    with pytest.raises(ValueError, match="made for other contents"):
        merge([one.path], RegMean(), tmp_path / "merged")


@pytest.mark.parametrize("place", [-3, 20])
def test_a_flipped_bit_is_found(one, place):
    store(one)
    flip(one.path / "statistics/gram.safetensors", place)
    with pytest.raises(
        ValueError, match=r"gram.safetensors is damaged: .*; take the statistics anew: `statistics` with"
    ):
        list(open_statistics(one, "gram").values())


def test_a_failed_write_leaves_what_was_there(one):
    def broken():
        yield "a.weight", DataStatistic(torch.ones(10, 10))
        yield "b.weight", DataStatistic(torch.full((9, 9), float("inf")))

    with pytest.raises(ValueError, match=r"statistic of b.weight holds numbers that are not finite"):
        store(one, statistics=broken())
    assert not list(one.path.glob("statistics/*"))
    before = store(one).file.read_bytes()
    with pytest.raises(FileExistsError, match=r"gram.safetensors exists already; .*overwrite=True"):
        store(one)
    with pytest.raises(ValueError, match="not finite"):
        store(one, statistics=broken(), overwrite=True)
    assert [file.name for file in (one.path / "statistics").iterdir()] == ["gram.safetensors"]
    assert open_statistics(one, "gram").file.read_bytes() == before


def test_links_are_not_followed(one, other, tmp_path):
    store(other)
    (one.path / "statistics").symlink_to(other.path / "statistics")
    with pytest.raises(ValueError, match=r"one/statistics is a link"):
        open_statistics(one, "gram")
    with pytest.raises(ValueError, match=r"one/statistics is a link"):
        store(one, "fisher")


def test_a_merge_gets_the_statistics_of_each_expert_and_weight_and_depends_on_them(one, other, tmp_path):
    for expert in (one, other):
        store(expert)
    merged = merge([one.path, other.path], RegMean(reduce=0.5), tmp_path / "merged")
    given = [dict(grams(len(expert.name))) for expert in (one, other)]
    for name in SHAPES:
        deltas = [one[name], other[name]]
        expected = RegMean(reduce=0.5).merge(deltas, Context(name, [found[name] for found in given]))
        assert torch.equal(merged[name].dense(), expected.dense())
    assert merged.record["method"]["init_args"] == {"scale": 1.0, "reduce": 0.5, "ridge": 0.0}

    def keys():
        return [Merged([one, other], method).key() for method in (RegMean(), Average())]

    before = keys()
    assert keys() == before
    store(other, statistics=grams(8), overwrite=True)
    after = keys()
    assert after[0] != before[0], "an interrupted merge would go on with other statistics"
    assert after[1] == before[1]


def test_the_statistics_of_one_weight_are_in_memory_at_a_time(tmp_path):
    sizes = {f"{letter}.weight": (2, 700) for letter in "abcdefgh"}
    deltas = [(name, Dense(torch.ones(shape))) for name, shape in sizes.items()]
    write_expert(tmp_path / "wide", deltas, make_record("FullExpert", BASE))
    wide = open_expert(tmp_path / "wide")
    store(wide, statistics=[(name, DataStatistic(torch.randn(700, 700))) for name in sizes])
    gathered = gather_statistics([wide], "gram", sizes)
    release, released = StoredStatistics.release, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoredStatistics, "release", lambda self, name: (released.append(name), release(self, name)))
        for name in sizes:
            (found,) = gathered(name)
            assert found.values.shape == (700, 700)
    assert released == list(sizes)[:-1]
    assert torch.equal(gathered("a.weight")[0].values, open_statistics(wide, "gram")["a.weight"].values)


def check_refused(paths, method, sentence, out):
    with pytest.raises(ValueError, match=sentence):
        merge(paths, method, out)
    assert not out.exists()


def test_missing_and_unfit_statistics_are_refused_with_the_command_that_makes_them(one, other, tmp_path):
    paths, out = [one.path, other.path], tmp_path / "merged"
    command = r"`statistics` with `experts=\[\S*one', \S*another'\]`, `kind='"
    check_refused(paths, Fisher(), rf"one has no fisher statistics.*{command}fisher'` and `tasks=`$", out)
    store(one)
    check_refused(
        paths, RegMean(), rf"another has no gram statistics.*{command}gram'` and `tasks=`, `overwrite=True`$", out
    )
    store(other, statistics=grams(1, ["a.weight"]))
    check_refused(paths, RegMean(), rf"of .*another do not cover b.weight and 1 more weights.*{command}gram", out)
    store(other, statistics=[(name, DataStatistic(torch.ones(3, 3))) for name in SHAPES], overwrite=True)
    check_refused(paths, RegMean(), r"of .*another have the wrong shape for a.weight", out)
    with pytest.raises(FileNotFoundError, match=r"one has no fisher statistics; take them: `statistics` with"):
        open_statistics(one, "fisher")


def test_statistics_of_one_merge_are_not_taken_for_another(one, other, tmp_path):
    for expert in (one, other):
        store(expert, "merged_gram", among=[one, other])
    for paths, out in (([one.path, other.path], "ab"), ([other.path, one.path], "ba")):
        merge(paths, RegMeanPlusPlus(), tmp_path / out)
    check_refused([one.path], RegMeanPlusPlus(), "were taken in a merge of other experts", tmp_path / "alone")
