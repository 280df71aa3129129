"""The streamed merge of experts on disk is the method applied weight by weight, and records where it came from."""

import importlib
import sys
import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from testbed.merging import merge_one
from testbed.random_deltas import random_delta

from modular_experts.deltas import Sparse
from modular_experts.library import make_record, new_directory, open_expert, write_expert
from modular_experts.library.form import Form
from modular_experts.merging import merged as merger
from modular_experts.merging.merged import Merged, merge
from modular_experts.methods import SVC, TIES, Average, MergeMethod, SparseAverage, TaskArithmetic

BASE = {"id": "base", "revision": None, "fingerprint": "a" * 64}
SHAPES = {"b.weight": (6, 9), "a.weight": (7, 10), "c.weight": (4, 4)}


def make(path, form, seed, weights=("a.weight", "b.weight", "c.weight"), base=BASE, tasks=(), **how):
    deltas = ((name, random_delta(form, SHAPES[name], seed, torch.float32)) for name in weights)
    write_expert(path, deltas, make_record("SparseExpert", base, tasks=tasks), **how)
    return path


@pytest.fixture
def library(tmp_path):
    make(tmp_path / "one", "Sparse", 1, tasks=["intents"])
    make(tmp_path / "two", "Sparse", 2, weights=["a.weight", "c.weight"], tasks=["slots", "intents"])
    make(tmp_path / "three", "LowRank", 3, weights=["b.weight"])
    return tmp_path


@pytest.mark.parametrize("method", [Average(), SparseAverage(), TaskArithmetic(0.4), TIES()], ids=str)
def test_merge_on_disk_is_the_method_weight_by_weight(library, method):
    merged = merge([library / name for name in ("one", "two", "three")], method, library / "merged")
    assert list(merged) == ["a.weight", "b.weight", "c.weight"]
    experts = [open_expert(library / name) for name in ("one", "two", "three")]
    for name, shape in SHAPES.items():
        deltas = [expert[name] if name in expert else Sparse.zero(shape) for expert in experts]
        assert torch.equal(merged[name].dense(), method.merge(deltas).dense())


def test_merge_of_merges_works_and_provenance_tells_the_parents(library):
    method = SparseAverage(scale=0.5)
    record = merge_two(library, "ab", method).record
    again = merge([library / "ab", library / "three"], method, library / "abc")
    assert record["kind"] == "merge"
    assert record["tasks"] == ["intents", "slots"]
    assert record["base"] == BASE
    assert [parent["name"] for parent in record["parents"]] == ["one", "two"]
    assert record["parents"][1]["content_hash"] == open_expert(library / "two").content_hash
    assert record["method"]["class_path"].endswith(".SparseAverage")
    assert record["method"]["init_args"] == {"scale": 0.5, "count": "values", "exponent": 1.0}
    assert again.record["parents"][0]["content_hash"] == open_expert(library / "ab").content_hash


def test_a_merge_with_its_own_parents_is_named_before_it_begins(library, caplog):
    merge_two(library, "ab", SparseAverage())
    merge([library / "ab", library / "three"], SparseAverage(), library / "apart")
    assert not caplog.messages
    merge([library / name for name in ("one", "three", "ab", "two")], SparseAverage(), library / "again")
    (message,) = caplog.messages
    assert "ab is a merge of one and two: merged with it, they count twice; leave out the merge or" in message


def test_one_weight_is_in_memory_at_a_time(library, monkeypatch):
    alive, most = [], 0
    read = Merged.deltas_of

    def counted(*arguments):
        nonlocal most
        alive[:] = [reference for reference in alive if reference() is not None]
        found = read(*arguments)
        alive.extend(weakref.ref(delta) for delta in found)
        most = max(most, len(alive))
        return found

    monkeypatch.setattr(Merged, "deltas_of", counted)
    merge([library / "one", library / "two", library / "three"], SparseAverage(), library / "merged")
    assert most <= 6, "deltas of more than this weight and the last one are alive"


def check_refused(library, paths, sentence, error=ValueError, out="merged"):
    before = sorted(path.name for path in library.iterdir())
    with pytest.raises(error, match=sentence):
        merge([library / path for path in paths], Average(), library / out)
    assert sorted(path.name for path in library.iterdir()) == before


@pytest.mark.parametrize(
    ("paths", "sentence", "more"),
    [
        ([], "list of experts is empty", {}),
        (["one", "one"], "listed twice", {}),
        (["one", "./one"], "listed twice", {}),
        (["one", "tow"], "did you mean .*two", {"error": FileNotFoundError}),
        (["one", "two"], "exists already", {"error": FileExistsError, "out": "three"}),
        (["one", "two"], "cannot be the name", {"out": "-x"}),
        (["one", "other"], "different bases.*base .fingerprint aaaa.*elsewhere .fingerprint bbbb", {}),
        (["one", "odd"], r"one and odd disagree on the shape of a.weight: \(7, 10\) and \(3, 3\)", {}),
    ],
)
def test_bad_requests_are_refused_and_leave_nothing(library, paths, sentence, more):
    make(library / "other", "Sparse", 4, base={**BASE, "id": "elsewhere", "fingerprint": "b" * 64})
    write_expert(library / "odd", [("a.weight", Sparse.zero((3, 3)))], make_record("X", BASE))
    check_refused(library, paths, sentence, **more)


def test_a_damaged_expert_stops_the_merge_and_leaves_nothing(library):
    file = library / "two/delta.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    check_refused(library, ["one", "two"], r"two/delta.safetensors is damaged: the .* of c.weight")


def merge_two(library, out, method=Average(), **settings):  # noqa: B008 - nothing changes it
    return merge([library / "one", library / "two"], method, library / out, **settings)


def test_patterns_give_weights_methods_of_their_own(library):
    rules = {r"[ab]\.weight": TaskArithmetic(3.0), "c.*": None}
    merged = merge_two(library, "merged", None, per_weight=rules)
    one, two = (open_expert(library / name) for name in ("one", "two"))
    assert list(merged) == ["a.weight", "b.weight"]
    torch.testing.assert_close(merged["a.weight"].dense(), 3 * (one["a.weight"].dense() + two["a.weight"].dense()))
    assert merged.record["method"] is None
    assert merged.record["per_weight"]["c.*"] is None
    assert merged.record["per_weight"][r"[ab]\.weight"]["init_args"]["scale"] == 3.0


def test_what_no_pattern_matches_gets_the_method_or_keeps_the_base(library):
    first_wins = {"a.*": TaskArithmetic(), ".*weight": TaskArithmetic(5.0)}
    with_rest = merge_two(library, "with-rest", per_weight={"a.*": TaskArithmetic()})
    without = merge_two(library, "without", None, per_weight={"a.*": TaskArithmetic()})
    narrow = merge_two(library, "narrow", None, per_weight=first_wins)
    average = merge_two(library, "average")
    assert list(without) == ["a.weight"]
    assert torch.equal(with_rest["a.weight"].dense(), without["a.weight"].dense())
    assert torch.equal(with_rest["c.weight"].dense(), average["c.weight"].dense())
    assert torch.equal(narrow["a.weight"].dense(), without["a.weight"].dense())
    torch.testing.assert_close(narrow["c.weight"].dense(), 10 * average["c.weight"].dense())


def test_one_method_in_two_patterns_acts_as_two(library):
    def pruned(first: TIES, second: TIES, rest: TIES) -> Merged:
        return Merged([library / "one", library / "two"], rest, {"a.*": first, "b.*": second})

    same = TIES(keep=0.3, scope="global")
    shared, apart = pruned(same, same, same), pruned(*(TIES(keep=0.3, scope="global") for _ in range(3)))
    together = Merged([library / "one", library / "two"], TIES(keep=0.3, scope="global"))
    for name in SHAPES:
        assert torch.equal(shared[name].dense(), apart[name].dense())
    assert any(not torch.equal(shared[name].dense(), together[name].dense()) for name in SHAPES)


def test_global_statistics_are_those_of_the_weights_that_the_method_gets(library):
    method = TIES(keep=0.3, scope="global")
    apart = merge_two(library, "apart", None, per_weight={"a.*": method})
    expected = merge_one(method, [open_expert(library / name)["a.weight"] for name in ("one", "two")])
    assert torch.equal(apart["a.weight"].dense(), expected.dense())


@pytest.mark.parametrize(
    ("method", "rules", "sentence"),
    [
        (Average(), {r"d\..*": TIES()}, r"'d\\\.\.\*' matches no weight that the experts move, or an earlier"),
        (Average(), {"(": TIES()}, "'\\(' is not a regular expression"),
        (Average(), {".*": TIES(), "a.*": TIES()}, r"'a\.\*' matches no weight .* put the narrower first"),
        (None, {}, "there is no merge method"),
        (None, {".*": None}, "there is no merge method"),
        (None, {"a.*": None, "d.*": TIES()}, "matches no weight"),
    ],
)
def test_bad_rules_get_a_sentence(library, method, rules, sentence):
    with pytest.raises(ValueError, match=sentence):
        merge_two(library, "merged", method, per_weight=rules)
    assert not (library / "merged").exists()


@dataclass(frozen=True)
class Interrupted(MergeMethod):
    """Averages until the weight `at_weight` comes, and is interrupted there."""

    calls: ClassVar[list[str]] = []
    at_weight: ClassVar[str] = ""

    def merge(self, deltas, context=None):
        self.calls.append(context.name)
        if context.name == self.at_weight:
            raise KeyboardInterrupt
        return Average().merge(deltas)


def interrupted_at(library, weight):
    Interrupted.calls.clear()
    Interrupted.at_weight = weight
    with pytest.raises(KeyboardInterrupt) if weight else nullcontext():
        merge_two(library, "merged", Interrupted())
    return list(Interrupted.calls)


def hidden(library):
    return [path for path in library.iterdir() if path.name.startswith(".")]


def test_interrupted_merge_goes_on_where_it_stopped_and_ends_with_the_same_bytes(library):
    assert interrupted_at(library, "b.weight") == ["a.weight", "b.weight"]
    assert len(hidden(library)) == 1
    assert not (library / "merged").exists()
    assert interrupted_at(library, "c.weight") == ["b.weight", "c.weight"]
    assert interrupted_at(library, "") == ["c.weight"]
    assert not hidden(library)
    whole = merge_two(library, "whole", Interrupted())
    assert (library / "merged/delta.safetensors").read_bytes() == (library / "whole/delta.safetensors").read_bytes()
    assert open_expert(library / "merged").content_hash == whole.content_hash


def test_what_an_interrupted_merge_left_is_only_taken_up_whole(library):
    interrupted_at(library, "c.weight")
    (place,) = hidden(library)
    data = place / "delta.safetensors.data"
    content = bytearray(data.read_bytes())
    content[-1] ^= 1  # the last bytes of b.weight
    data.write_bytes(content)
    with (place / "delta.safetensors.notes").open("a") as notes:
        notes.write('{"what": ["c.wei')
    assert interrupted_at(library, "") == ["b.weight", "c.weight"]
    open_expert(library / "merged").verify()


def test_another_merge_does_not_take_up_what_one_left_and_removes_it(library):
    interrupted_at(library, "c.weight")
    assert len(hidden(library)) == 1
    merge_two(library, "merged", TaskArithmetic())
    assert not hidden(library)
    assert open_expert(library / "merged").record["method"]["class_path"].endswith("TaskArithmetic")
    # So does a merge that keeps nearly as many entries.
    size = merge_two(library, "whole")["a.weight"].support_size
    forms = Form(keep=4.01 / size), Form(keep=3.99 / size)
    first, second = (merge_two(library, f"keeps-{count}", form=form) for count, form in zip((4, 3), forms, strict=True))
    assert [one["a.weight"].support_size for one in (first, second)] == [4, 3]
    Interrupted.at_weight = "c.weight"
    with pytest.raises(KeyboardInterrupt):
        merge_two(library, "few", Interrupted(), form=forms[0])
    Interrupted.at_weight = ""
    few = merge_two(library, "few", Interrupted(), form=forms[1])
    assert few.content_hash == second.content_hash
    assert few.record["hyperparameters"]["cut"]["keep"] == forms[1].keep


def test_two_processes_do_not_write_one_merge(library):
    with new_directory(library / "x", key="k" * 16) as first:
        (first / "expert.json").touch()
        second = new_directory(library / "x", key="k" * 16)
        with pytest.raises(BlockingIOError, match="x is being written by another process"):
            second.__enter__()
        assert len(hidden(library)) == 1


@dataclass(frozen=True)
class WithTasks(MergeMethod):
    """A method that gives each expert's task twice its own delta, beside the average."""

    factor: float = 2.0

    def merge(self, deltas):
        return Average().merge(deltas)

    def per_task(self, deltas, expert, context=None):
        return deltas[expert] * self.factor


def test_experts_of_the_tasks_are_written_beside_the_merge(library):
    merge_two(library, "merged", WithTasks())
    for name in ("one", "two"):
        beside, own = open_expert(library / f"merged-{name}"), open_expert(library / name)
        for weight in own:
            assert torch.equal(beside[weight].dense(), 2 * own[weight].dense())
        assert [parent["name"] for parent in beside.record["parents"]] == ["one", "two"]
        assert beside.record["tasks"] == own.record["tasks"]
    assert open_expert(library / "merged").record["tasks"] == sorted(
        {task for name in ("one", "two") for task in open_expert(library / name).record["tasks"]}
    )
    # An expert that is there stops the merge before it begins.
    for out, there in (("merged", "merged"), ("again", "again-two")):
        make(library / "again-two", "Sparse", 5, overwrite=True)
        with pytest.raises(FileExistsError, match=there):
            merge_two(library, out, WithTasks())
    assert not (library / "again").exists()


def test_interrupted_merge_with_experts_beside_goes_on(library, monkeypatch):
    written = merger.write_expert

    def interrupted(path, *more, **settings):
        if path.name == "merged":
            raise KeyboardInterrupt
        return written(path, *more, **settings)

    monkeypatch.setattr(merger, "write_expert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge_two(library, "merged", WithTasks())
    assert (library / "merged-one").exists()
    monkeypatch.setattr(merger, "write_expert", written)
    # Other settings, code or statistics than those with which they were made.
    with pytest.raises(FileExistsError, match="merged-one exists already"):
        merge_two(library, "merged", WithTasks(factor=3.0))
    merge_two(library, "merged", WithTasks())
    assert {path.name for path in library.iterdir()} >= {"merged", "merged-one", "merged-two"}


def key_of(library, method=None, **rules):
    experts = [open_expert(library / name) for name in ("one", "two")]
    return Merged(experts, method, rules.get("per_weight")).key()


def test_key_tells_apart_what_gives_other_results(library):
    narrow, wide = ("a.*", TIES()), (".*", Average())
    keys = {
        key_of(library, Average()),
        key_of(library, Average(scale=2.0)),
        key_of(library, SVC(TIES(keep=0.1))),
        key_of(library, SVC(TIES(keep=0.2))),
        key_of(library, per_weight=dict([narrow, (".*weight", Average())])),
        key_of(library, per_weight=dict([narrow, wide])),
    }
    assert len(keys) == 6
    assert key_of(library, Average()) in keys
    overlapping = {"[ab].*": TIES(), "[bc].*": Average()}  # b.weight gets the first
    turned = dict(reversed(overlapping.items()))
    assert key_of(library, per_weight=overlapping) != key_of(library, per_weight=turned)


OWN = """
from dataclasses import dataclass
from modular_experts.methods import MergeMethod

@dataclass(frozen=True)
class Own(MergeMethod):
    def merge(self, deltas):
        return deltas[0] * FACTOR
"""


@pytest.mark.parametrize("around", [lambda method: method, SVC], ids=["alone", "inside"])
def test_key_changes_with_the_code_of_a_method_of_ones_own(around, library, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    keys = []
    for factor in ("1.0", "1.0", "2.25"):
        (tmp_path / "own_method.py").write_text(OWN.replace("FACTOR", factor))
        monkeypatch.delitem(sys.modules, "own_method", raising=False)
        keys.append(key_of(library, around(importlib.import_module("own_method").Own())))
    assert keys[0] == keys[1] != keys[2]


def test_experts_may_be_paths_opened_or_lazy_and_the_method_a_name(library):
    one, two = (open_expert(library / name) for name in ("one", "two"))
    lazy = Merged([library / "one", 0.5 * two], "TaskArithmetic")
    assert isinstance(lazy, Merged)
    written = merge([one, 0.5 * two], TaskArithmetic(), library / "merged")
    plain = TaskArithmetic(weights=[1.0, 0.5])
    assert lazy.shapes() == written.shapes()
    for name in one:
        expected = plain.merge([one[name], two[name] if name in two else Sparse.zero(SHAPES[name])])
        torch.testing.assert_close(lazy[name].dense(), expected.dense())
        assert torch.equal(lazy[name].dense(), written[name].dense())
    assert written.record["hyperparameters"] == {"experts": ["one", "0.5 * two"]}
    assert [parent["name"] for parent in written.record["parents"]] == ["one", "two"]
    again = merge([lazy, library / "three"], "Average", library / "again")
    assert again.record["tasks"] == ["intents", "slots"]
    assert again.record["hyperparameters"] == {"experts": ["TaskArithmetic(one, 0.5 * two)", "three"]}
    keys = {Merged([one, factor * two], "Average").key() for factor in (0.5, 0.25)}
    sums = [Merged([one, two], TaskArithmetic(scale)) for scale in (1, 2)]
    keys |= {Merged([total, library / "three"], "Average").key() for total in sums}
    assert len(keys) == 4
