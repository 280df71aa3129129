"""`push` and `pull` as they are typed, and the commands that a card shows, typed too."""

import json
import shlex
import sys
from pathlib import Path

import pytest
import torch
from testbed.random_deltas import random_delta

from modular_experts.base import Base
from modular_experts.base.files import fingerprint
from modular_experts.library import Library, make_record, open_expert, write_expert

REPO = "someone/experts"


@pytest.fixture
def place(tiny_llama_dir, tmp_path, monkeypatch):
    """A directory to stand in, with a library of two experts and a file with rows of their task."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    weights = {n: w for n, w in Base.open(tiny_llama_dir).load().named_parameters() if n.endswith("q_proj.weight")}
    base = {"id": str(tiny_llama_dir), "revision": None, "fingerprint": fingerprint(tiny_llama_dir)}
    for seed, name in enumerate("ab"):
        deltas = [(n, random_delta("Sparse", w.shape, seed, torch.float32, share=0.05)) for n, w in weights.items()]
        write_expert(tmp_path / "library" / name, deltas, make_record("SparseExpert", base, tasks=["its"]))
    rows = [{"input": f"{i}:", "target": "x", "split": "test"} for i in range(2)]
    (tmp_path / "its.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_push_and_pull_after_a_dry_run_that_prints_the_card_and_the_files(done, place, hub):
    out = done("push", "--experts", "library/a", "library/b", "--repo", REPO, "--license", "mit", "--dry_run", "true")
    assert out.startswith("---\nlibrary_name: modular-experts\n")
    size = Path("library/a/delta.safetensors").stat().st_size
    assert f"\na/delta.safetensors: {size / 1000:.3g} kB\n" in out
    assert "nothing was written; without --dry-run, 2 experts would be pushed to http" in out
    assert hub.written() == []
    assert hub.repositories == {}
    out = done("push", "--experts", "[library/a, library/b]", "--repo", REPO, "--license", "mit")
    sha = hub.repositories[REPO].branches["main"]
    assert out.splitlines()[-1].startswith(f"pushed 2 experts to {REPO}: http://")
    assert out.splitlines()[-1].endswith(f"/{REPO}/commit/{sha}")
    out = done("pull", "--repo", REPO, "--out", "new", "--experts", "[b]")
    assert out.splitlines() == [
        f"new/b: SparseExpert, 2 weights, {100 * open_expert('library/b').kept_share:.3g} % of their entries kept, "
        f"{open_expert('new/b').size_on_disk / 1000:.3g} kB",
        f"pulled 1 expert of {REPO}; the same again: --revision {sha}",
    ]
    assert open_expert("new/b").content_hash == open_expert("library/b").content_hash


def test_the_commands_of_a_card_work_as_written(run, place, hub, tiny_llama_dir, monkeypatch):
    run("push", "--experts", "library/a", "library/b", "--repo", REPO, "--license", "mit")
    card = hub.repositories[REPO].files()["README.md"].decode()
    lines = card.partition("```bash\n")[2].partition("```")[0].splitlines()
    commands = [words for line in lines if (words := shlex.split(line, comments=True))[0] == "modular-experts"]
    assert [words[1] for words in commands] == ["pull", "show", "evaluate", "apply"]
    assert "`BASE` is the directory of the base" in card
    (place / "user").mkdir()
    monkeypatch.chdir(place / "user")
    (place / "its.jsonl").rename("TASK.jsonl")
    Path("BASE").symlink_to(tiny_llama_dir)
    for words in commands:
        code, _, err = run(*words[1:])
        assert code == 0, (words, err)
    assert list(Library("library")) == ["a", "b"]
    assert Path("checkpoint/config.json").is_file()
