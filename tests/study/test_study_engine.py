"""A study on another engine measures the same numbers, and its options reach the engine."""

from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from modular_experts import estimate_fit
from modular_experts.__main__ import main
from modular_experts.experts import FullExpert, LoRAExpert
from modular_experts.library import Library
from modular_experts.reports import Results

BROKEN = """
from concurrent.futures import BrokenExecutor, Executor, Future


class Broken(Executor):
    def __init__(self, word):
        open(word, "w").close()

    def submit(self, *call):
        with open("submitted", "a") as file:
            file.write("call ")
        future = Future()
        future.set_exception(BrokenExecutor("the cluster dropped the call"))
        return future
"""


class Seen(Exception):
    """Ends a study before its first piece."""


@pytest.fixture
def config(two_task_files, one_block) -> None:
    lora = {"expert": {"class_path": "LoRAExpert", "init_args": {"rank": 2}}, "modules": "all-linear", "steps": 2}
    settings = {"base": str(one_block), "tasks": {"held_in": ["a.jsonl", "b.jsonl"]}}
    settings |= {"experts": {"lora": lora}, "merges": ["SparseAverage"], "max_new_tokens": 3}
    Path("study.yaml").write_text(yaml.safe_dump(settings))


def study(out: str, *words: str) -> int:
    return main(["study", "--config", "study.yaml", "--out", out, *words])


def test_a_piece_that_a_cluster_drops_fails_with_the_words_of_the_cluster(config, capsys) -> None:
    Path("study_broken.py").write_text(BROKEN)
    engine = ["--engine", "study_broken.Broken", "--engine_settings.word", "hello"]
    assert study("mine", *engine) == 1
    assert Path("hello").exists(), "the class of a user gets its settings"
    dropped = "failed: tests base, experts lora a 0, experts lora b 0: the cluster dropped the call\n"
    assert dropped in capsys.readouterr().out
    submitted = Path("submitted").read_text()
    assert study("mine", *engine) == 1
    assert Path("submitted").read_text() == submitted, "a cluster got a job for a piece that is not tried again"
    assert dropped in capsys.readouterr().out


@pytest.mark.cluster
def test_a_study_on_a_cluster_has_the_numbers_of_this_machine(config, cluster) -> None:
    name, settings = cluster
    assert not study("here", "--processes", "1")
    words = [word for key, value in settings.items() for word in (f"--engine_settings.{key}", str(value))]
    assert not study("there", "--engine", name, *words)
    here, there = (
        [(row["model"], row["task"], row["metric"], row["value"]) for row in Results.read(f"{out}/results.json").rows]
        for out in ("here", "there")
    )
    assert here == there
    hashes = [{key: one.content_hash for key, one in Library(f"{out}/library").items()} for out in ("here", "there")]
    assert hashes[0] == hashes[1]
    assert len(hashes[0]) == 3


def test_as_many_trainings_run_at_once_as_the_largest_one_lets(config, monkeypatch) -> None:
    settings = yaml.safe_load(Path("study.yaml").read_text())
    how = {"modules": "all-linear", "steps": 2, "batch_size": 4}
    kinds = {"lora": LoRAExpert, "full": FullExpert}
    settings["experts"] = {kind: how | {"expert": expert.__name__} for kind, expert in kinds.items()}
    Path("study.yaml").write_text(yaml.safe_dump(settings))
    own = how | {"base": settings["base"], "tasks": ["a.jsonl"]}
    taken = estimate_fit(**own, expert=FullExpert, fit_into="1TB").bytes
    given = []

    def local(processes: int | None, bytes_each: int) -> None:
        given.append(bytes_each)
        raise Seen

    monkeypatch.setattr("modular_experts.study.run.LocalProcesses", local)
    for free in (0, 10**12):
        monkeypatch.setattr("modular_experts.study.run.free_memory", lambda free=free: free)
        with pytest.raises(Seen):
            main(["study", "--config", "study.yaml", "--out", "runs/mine"])
    base = sum(one.numel() for one in AutoModelForCausalLM.from_pretrained(settings["base"]).parameters())
    # The experts of the first kind take less.
    assert given == [sum(taken.values()) - taken["Python and its libraries"], 2 * 4 * base]
