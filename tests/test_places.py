"""A place that begins with `~` is in the home directory, also where no shell has expanded it."""

import pytest
from conftest import write_rows
from testbed.random_deltas import random_delta

from modular_experts import apply, evaluate, look
from modular_experts.base import Base
from modular_experts.base.files import fingerprint
from modular_experts.library import make_record, write_expert
from modular_experts.merging.objective import write_trials
from modular_experts.reports import Results


@pytest.fixture
def home(tmp_path, tiny_llama_dir, monkeypatch):
    """A home with the base, two experts and a task, and another current directory."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    (home / "base").symlink_to(tiny_llama_dir)
    name, weight = next((n, w) for n, w in Base.open(tiny_llama_dir).load().named_parameters() if "q_proj" in n)
    for seed, expert in enumerate("ab"):
        record = make_record("X", {"id": "~/base", "revision": None, "fingerprint": fingerprint(tiny_llama_dir)})
        write_expert(home / "library" / expert, [(name, random_delta("Sparse", weight.shape, seed))], record)
    rows = [{"input": f"{letter}:", "target": letter.upper(), "split": "test"} for letter in "abc"]
    write_rows(home / "letters.jsonl", rows)
    yield home
    assert not list(here.iterdir())


def test_python_reads_and_writes_in_the_home_directory(home) -> None:
    apply("~/library/a", "~/checkpoint")
    models = {"a": "~/library/a", "whole": "~/checkpoint"}
    found = evaluate("~/base", models, "~/letters.jsonl", 3, out="~/runs")
    assert Results.read("~/runs/results.json").rows == found.rows
    assert (home / "runs/report.html").is_file()
    losses = [row["value"] for row in found.where(metric="loss").rows]
    assert losses == [pytest.approx(losses[0], rel=1e-5)] * 2
    with pytest.raises(FileExistsError, match=r"home/runs/results\.json exists already"):
        evaluate("~/base", models, "~/letters.jsonl", 3, out="~/runs")
    look("~/base", "~/letters.jsonl", page="~/page.html")
    assert (home / "page.html").is_file()
    assert write_trials("~/library/a", []).is_file()


def test_the_command_line_does_so_behind_an_equals_sign_which_shells_do_not_expand(home, run) -> None:
    assert run("interference", "~/library/a", "~/library/b", "--out=~/shared.json")[0] == 0
    assert (home / "shared.json").is_file()
    task = "--tasks=~/letters.jsonl"
    model = "sum=~/library/a+~/library/b"
    assert run("evaluate", "--base=~/base", "--experts", model, task, "--out=~/runs")[0] == 0
    assert "sum" in Results.read(home / "runs/results.json").values("model")
