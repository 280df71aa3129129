"""The library: what is written comes back bit for bit, whole or not at all, and whatever is wrong is named with its
file.
"""

import json
import os
import re
import shutil
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch
from testbed.random_deltas import FORMS, random_delta, same
from testbed.stored_by_hand import as_it_is, write_by_hand

from modular_experts.deltas import BlockSparse, Dense, Sparse
from modular_experts.library import Library, check_name, check_target, make_record, new_directory, open_expert, opening
from modular_experts.library import write_expert as write
from modular_experts.library.atomic import new_file

BASE = {"id": "base", "revision": None, "fingerprint": "f" * 64}
RECORD = make_record("SparseExpert", BASE, tasks=["intents"], scores={"intents": {"loss": 1.5}}, seed=3)


def deltas(seed=0):
    return {f"layers.{i}.weight": random_delta(form, (7, 10), seed + i, torch.float32) for i, form in enumerate(FORMS)}


@pytest.fixture
def expert(tmp_path):
    write(tmp_path / "library" / "one", deltas().items(), RECORD)
    return tmp_path / "library" / "one"


def test_what_is_written_comes_back_bit_for_bit(expert):
    stored = open_expert(expert)
    assert list(stored) == sorted(deltas())
    assert all(same(stored[name], delta) for name, delta in deltas().items())
    assert stored.shapes() == {name: delta.shape for name, delta in deltas().items()}
    assert stored.forms()["layers.0.weight"] == "Dense"
    assert {**stored.record, "content_hash": None} == {**RECORD, "content_hash": None}
    stored.verify()


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_small_tensors_leave_the_memory_together(tmp_path) -> None:
    """Tensors that share a page stay where one after the other is released."""
    small = [(f"w{number:02}", random_delta("LowRank", (7, 10), number, torch.float32)) for number in range(40)]
    write(tmp_path / "x", small, RECORD)
    stored = open_expert(tmp_path / "x")

    def resident() -> int:
        parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
        mine = [part for part in parts if str(tmp_path) in part.partition("\n")[0]]
        assert mine, "the file is mapped"
        return sum(int(re.search(r"^Rss: +(\d+)", part, re.MULTILINE)[1]) for part in mine)

    assert all(same(stored[name], delta) for name, delta in small)
    assert resident() > 0
    stored.release()
    assert resident() == 0
    assert all(same(stored[name], delta) for name, delta in small)


def test_content_hash_is_of_the_content_alone(tmp_path):
    forward, backward = list(deltas().items()), list(deltas().items())[::-1]
    one = write(tmp_path / "one", forward, RECORD)
    assert write(tmp_path / "two", backward, {**RECORD, "seed": 9}) == one
    assert write(tmp_path / "three", deltas(seed=1).items(), RECORD) != one
    renamed = [("other", forward[0][1]), *forward[1:]]
    assert write(tmp_path / "four", renamed, RECORD) != one
    assert open_expert(tmp_path / "one").content_hash == one


def test_every_flipped_byte_is_noticed_and_named(expert):
    file = expert / "delta.safetensors"
    whole = file.read_bytes()
    for position in range(0, len(whole), 37):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        with pytest.raises(ValueError, match=r"delta.safetensors is damaged"):
            open_expert(expert).verify()
    file.write_bytes(whole)
    open_expert(expert).verify()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda record: record.update(format="modular-experts/9"), "reads 'modular-experts/1', 'modular-experts/2', '"),
        (lambda record: record.pop("tasks"), "tasks is missing or of a wrong type"),
        (lambda record: record["base"].pop("fingerprint"), "fingerprint of its base"),
        (lambda record: record.update(parents=[{"name": "a"}]), "a parent is not"),
        (lambda record: record.update(method={"class_path": "TIES"}), "a merge method is not"),
        (lambda record: record.update(hyperparameters=[1], costs="none"), "hyperparameters, costs is not"),
        (lambda record: record.update(content_hash="0" * 64), "content hash is not the one in"),
    ],
)
def test_a_record_that_is_not_one_is_named(expert, change, sentence):
    file = expert / "expert.json"
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=sentence):
        open_expert(expert)
    file.write_text("{")
    with pytest.raises(ValueError, match=r"expert.json is damaged: it is not valid JSON"):
        open_expert(expert)


@pytest.mark.parametrize(
    ("delta", "sentence"),
    [
        (Sparse(torch.tensor([0, 12]), torch.ones(2), torch.Size((3, 4))), r"out of \[0, 12\)"),
        (Sparse(torch.tensor([-1, 2]), torch.ones(2), torch.Size((3, 4))), "from -1 to 2"),
        (Sparse(torch.tensor([5, 2]), torch.ones(2), torch.Size((3, 4))), "not sorted and unique"),
        (Sparse(torch.tensor([2, 2]), torch.ones(2), torch.Size((3, 4))), "not sorted and unique"),
        (BlockSparse(torch.tensor([4]), torch.ones(1, 2, 2), torch.Size((3, 4))), r"out of \[0, 4\)"),
        (Sparse(torch.tensor([1, 2]), torch.ones(3), torch.Size((3, 4))), "are not a Sparse delta"),
        (BlockSparse(torch.tensor([1]), torch.ones(2, 2, 2), torch.Size((3, 4))), "are not a BlockSparse delta"),
    ],
)
def test_content_that_is_no_delta_is_refused(tmp_path, delta, sentence):
    forged = write_by_hand(tmp_path / "x", {"w": as_it_is(delta)}, RECORD)
    with pytest.raises(ValueError, match=rf"delta.safetensors is damaged: .*{sentence}"):
        open_expert(forged).verify()
    with pytest.raises(ValueError, match=r"the delta of w cannot be stored: its "):
        write(tmp_path / "y", [("w", delta)], RECORD)


def test_values_that_are_not_finite_and_records_that_could_not_be_read_are_not_written(tmp_path):
    for value in (float("nan"), float("inf"), 1e60):
        bad = Dense(torch.full((2, 2), value, dtype=torch.float64))
        with pytest.raises(ValueError, match=r"the delta of w cannot be stored: .*not finite"):
            write(tmp_path / "x", [("w", bad)], RECORD)
    for facts, sentence in (
        ({"tasks": [1, 2]}, "cannot be written: of its record a task is not what it must be"),
        ({"parents": [{"name": "a"}]}, "a parent is not"),
        ({"method": {"class_path": "TIES"}}, "a merge method is not"),
    ):
        with pytest.raises(ValueError, match=sentence):
            write(tmp_path / "x", [("w", Dense(torch.ones(2, 2)))], make_record("X", BASE, **facts))
    assert not list(tmp_path.iterdir())


def test_an_error_in_the_middle_leaves_what_was_there(expert):
    def broken():
        yield from list(deltas().items())[:2]
        raise RuntimeError("the disk is full")

    for name, overwrite in (("x", False), ("one", True)):
        with pytest.raises(RuntimeError):
            write(expert.parent / name, broken(), RECORD, overwrite=overwrite)
    assert [entry.name for entry in expert.parent.iterdir()] == ["one"]
    open_expert(expert).verify()


def test_an_existing_expert_is_kept_unless_overwritten(expert, tmp_path):
    before = open_expert(expert).content_hash
    with pytest.raises(FileExistsError, match=r"exists already.*`overwrite=True`"):
        write(expert, deltas(seed=5).items(), RECORD)
    assert open_expert(expert).content_hash == before
    old = open_expert(expert)
    after = write(expert, deltas(seed=5).items(), RECORD, overwrite=True)
    assert open_expert(expert).content_hash == after != before
    assert same(old["layers.0.weight"], deltas()["layers.0.weight"]), "an open expert goes on reading what it opened"
    assert [entry.name for entry in expert.parent.iterdir()] == ["one"]
    # What is no expert is never replaced.
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("two years of work")
    with pytest.raises(FileExistsError, match=r"cannot be replaced"):
        write(tmp_path / "thesis", deltas().items(), RECORD, overwrite=True)
    assert (tmp_path / "thesis/chapter.txt").exists()


def test_names_that_leave_the_library_are_refused_and_ordinary_ones_allowed():
    for name in ("", ".", "..", "../x", "a/b", "-x", ".hidden", "a" * 65, "x\0", "Kelvin\u212a", "a b"):
        with pytest.raises(ValueError, match=r"cannot be the name of an expert"):
            check_name(name)
    for name in ("a", "intents-sparse", "v1.0_b", "9", "a" * 64):
        assert check_name(name) == name


def test_links_that_lead_out_are_not_followed(expert, tmp_path):
    os.symlink(expert, tmp_path / "library" / "linked")
    os.symlink(expert, tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"link that leads out"):
        open_expert(tmp_path / "elsewhere")
    (expert / "delta.safetensors").rename(tmp_path / "delta.safetensors")
    os.symlink(tmp_path / "delta.safetensors", expert / "delta.safetensors")
    with pytest.raises(ValueError, match=r"link that leads out"):
        open_expert(expert)
    assert list(Library(tmp_path / "library")) == ["one"]


def test_library_lists_complete_experts_only_and_names_what_others_lack(expert):
    library = Library(expert.parent)
    for name, left in (("half", "expert.json"), ("other-half", "delta.safetensors"), ("a b", None), (".tmp", None)):
        shutil.copytree(expert, expert.parent / name)
        for file in ("expert.json", "delta.safetensors") if left else ():
            if file != left:
                (expert.parent / name / file).unlink()
    (expert.parent / "notes").mkdir()
    (expert.parent / "note.txt").write_text("")
    (expert.parent / "linked").symlink_to(expert)
    assert library.incomplete() == {
        "a b": "its name is not a valid name of an expert",
        "half": "delta.safetensors is missing",
        "linked": "it is a link, and links are not followed",
        "other-half": "expert.json is missing",
    }
    assert list(library) == ["one"]
    assert len(library) == 1
    assert "half" not in library
    assert library["one"].name == "one"
    with pytest.raises(KeyError, match=r"did you mean one"):
        library["onee"]
    with pytest.raises(FileNotFoundError, match=r"no such directory"):
        Library(expert.parent / "nowhere")
    with pytest.raises(ValueError, match=rf"one is an expert, not a library; its library is {expert.parent}$"):
        Library(expert.parent / "one")


def test_a_dense_delta_keeps_what_is_not_zero_and_a_tile_what_lies_inside(expert):
    dense, tile = torch.zeros(7, 10), BlockSparse(torch.tensor([5]), torch.ones(1, 4, 4), torch.Size((7, 10)))
    dense[2, 3:5] = 1.0
    write(expert.parent / "two", [("dense", Dense(dense)), ("tile", tile)], RECORD)
    assert open_expert(expert.parent / "two").kept_entries() == {"dense": 2, "tile": 3 * 2}


def test_a_place_that_cannot_be_written_to_is_refused_and_trying_leaves_nothing(expert, monkeypatch):
    before = sorted(expert.parent.rglob("*"))
    check_target(expert.parent / "new")
    check_target(expert, overwrite=True)
    assert sorted(expert.parent.rglob("*")) == before

    def full(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.mkdtemp", full)
    for target, overwrite in ((expert.parent / "deep/new", False), (expert, True)):
        with pytest.raises(PermissionError, match=r"cannot be written: in .*library, Read-only file system"):
            check_target(target, overwrite)


def test_two_writers_of_one_name_leave_one_whole_expert(tmp_path):
    slow = new_directory(tmp_path / "x")
    (slow.__enter__() / "expert.json").write_text("slow")
    write(tmp_path / "x", deltas().items(), RECORD)
    with pytest.raises(FileExistsError):
        slow.__exit__(None, None, None)
    open_expert(tmp_path / "x").verify()


@pytest.mark.parametrize("times", [1, 3, 100])
def test_an_expert_that_is_replaced_between_two_reads_is_read_again(expert, monkeypatch, times):
    read, seeds = opening.read_record, list(range(7, 7 + times))

    def replaced_after_it_is_read(file):
        found = read(file)
        if seeds:
            write(expert, deltas(seeds.pop()).items(), RECORD, overwrite=True)
        return found

    monkeypatch.setattr(opening, "read_record", replaced_after_it_is_read)
    if times == 100:
        with pytest.raises(ValueError, match="its content hash is not the one in"):
            open_expert(expert)
    else:
        found = open_expert(expert)
        assert all(same(found[name], delta) for name, delta in deltas(7).items())


def test_an_expert_is_found_between_the_two_renames_that_replace_it(expert):
    aside = expert.with_name(f".{expert.name}.0123abcd")
    expert.rename(aside)
    back = threading.Timer(0.01, aside.rename, [expert])
    back.start()
    open_expert(expert).verify()
    back.join()
    expert.rename(aside)
    with pytest.raises(FileNotFoundError, match="there is no such directory") as refused:
        open_expert(expert)
    assert aside.name not in str(refused.value)


@pytest.fixture(params=[0o022, 0o002, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_what_is_written_has_the_permissions_of_the_umask(tmp_path, umask):
    write(tmp_path / "a", deltas().items(), RECORD, state={"w/x": torch.ones(2)})
    with new_directory(tmp_path / "adapter") as directory:
        # safetensors makes a file for its owner alone.
        safetensors.torch.save_file({"w": torch.ones(2)}, directory / "model.safetensors")
        (directory / "expert.json").write_text("{}")
    with new_file(tmp_path / "results" / "results.json") as temporary:
        temporary.write_text("{}")
    found = {path.relative_to(tmp_path): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert len(found) == 9
    assert found == {path: (0o777 if (tmp_path / path).is_dir() else 0o666) & ~umask for path in found}
