"""`shrink` writes smaller experts, says what it tried, and refuses what loses too much."""

import json

import pytest
from testbed.searching import objective_on, random_experts, stored

from modular_experts.base.files import fingerprint
from modular_experts.library import open_expert, write_expert


@pytest.fixture
def tasks(tiny_llama_dir, task_files, tmp_path, monkeypatch) -> str:
    """The tasks as an option, in a directory with an expert of tiles of one of them."""
    monkeypatch.chdir(tmp_path)
    base = {"id": str(tiny_llama_dir), "revision": None, "fingerprint": fingerprint(tiny_llama_dir)}
    _, first, *_ = stored(tmp_path / "made", random_experts(objective_on(tiny_llama_dir, task_files)), base)
    write_expert(tmp_path / "library/a", first, {**first.record, "tasks": ["upper"]})
    return json.dumps([{"name": "upper", "path": str(task_files["upper"])}])


def test_an_expert_is_written_smaller(run, tasks) -> None:
    code, out, err = run("shrink", "--experts", "library/a", "--out", "small", "--bound", "10", "--data.tasks", tasks)
    assert (code, err) == (0, "")
    before, after = open_expert("library/a"), open_expert("small/a")
    assert "sign, 50% of the entries (written)" in out
    assert after.record["encoding"] == "sign"
    assert sum(after.stored_bytes().values()) < 0.4 * sum(before.stored_bytes().values())
    assert after.record["source"] == {
        "id": "a",
        "format": "shrunk to sign, 50% of the entries, scales fitted to outputs",
        "content_hash": before.content_hash,
    }
    assert run("shrink", "--experts", "library/a", "--out", "small", "--data.tasks", tasks)[0] == 1
    assert run("shrink", "--experts", "library/a", "--out", "small", "--overwrite", "--data.tasks", tasks)[0] == 0


def test_one_encoding_is_tried_if_it_is_named(run, tasks) -> None:
    words = ["--experts", "library/a", "--out", "small", "--to", "int4", "--bound", "10"]
    code, out, _ = run("shrink", *words, "--data.tasks", tasks)
    assert code == 0
    assert "int4 (written)" in out
    assert "magnitudes" not in out


def test_a_loss_that_rises_too_far_is_refused(run, tasks) -> None:
    words = ["--experts", "library/a", "--out", "small", "--to", "sign", "--keep", "0.1", "--bound", "0"]
    words += ["--labels", "experts"]  # the expert's own answers are likeliest with the expert as it was
    code, _, err = run("shrink", *words, "--data.tasks", tasks)
    assert code == 1
    assert "no smaller form of a keeps the loss within 0; allow more with --bound" in err


def test_a_share_belongs_to_one_encoding(run, tasks) -> None:
    code, _, err = run("shrink", "--experts", "library/a", "--out", "small", "--keep", "0.5", "--data.tasks", tasks)
    assert code != 0
    assert "name it, such as --to int4" in err
