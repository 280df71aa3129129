"""A study is one call in Python, with settings as in YAML, or with the classes and objects that these name."""

from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from conftest import write_rows

from modular_experts.data import Task
from modular_experts.experts import LoRAExpert
from modular_experts.library import Library
from modular_experts.methods import TIES, SparseAverage
from modular_experts.study import read_study, results_of, run_study
from modular_experts.study.plan import groups
from modular_experts.study.short_forms import named_tasks
from modular_experts.training.checkpoint import as_config


def test_objects_do_what_their_settings_do(two_task_files, one_block, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(two_task_files))
    lora = {"class_path": "LoRAExpert", "init_args": {"rank": 2}}
    average = {"class_path": "SparseAverage", "init_args": {"scale": 0.5}}
    ways = {
        "objects": (Task(path="a.jsonl", cap=2), partial(LoRAExpert, rank=2), SparseAverage(scale=0.5), TIES),
        "settings": ({"path": "a.jsonl", "cap": 2}, lora, average, "TIES"),
    }
    found = {}
    for name, (task, expert, *merges) in ways.items():
        experts = {"lora": {"expert": expert, "modules": "all-linear", "steps": 2}}
        study = read_study(one_block, [task, "b.jsonl"], experts, merges, max_new_tokens=3)
        with ThreadPoolExecutor(1) as executor:
            state = run_study(study, f"~/{name}", executor=executor)
        assert not state.failed
        rows = [(row["model"], row["task"], row["metric"], row["value"]) for row in results_of(study, state).rows]
        found[name] = rows, {key: one.content_hash for key, one in Library(f"{name}/library").items()}
    assert found["objects"] == found["settings"]
    assert {"lora-a", "merge-lora-SparseAverage", "merge-lora-TIES"} <= set(found["objects"][1])


def test_copies_of_rows_are_counted_before_the_pieces_run(tmp_path, one_block, caplog) -> None:
    class Refusing(Executor):
        def submit(self, work, *arguments, **settings):
            future: Future = Future()
            future.set_exception(ValueError("no machine"))
            return future

    rows = [{"input": "1+1=", "target": "2", "split": split} for split in ("train", "validation", "test")]
    files = [write_rows(tmp_path / "sums.jsonl", rows), tmp_path / "bad.jsonl"]
    files[1].write_text("{")
    study = read_study(one_block, list(map(str, files)), {"lora": {"expert": LoRAExpert, "modules": "all-linear"}})
    assert run_study(study, tmp_path / "out", executor=Refusing()).failed
    said = [record.getMessage() for record in caplog.records if "copies" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("sums: 1 of 1 validation rows and 1 of 1 test rows are also training rows")


@pytest.mark.parametrize(
    ("value", "settings"),
    [
        ({"a": [1, None, 0.5, True, "x"]}, {"a": [1, None, 0.5, True, "x"]}),
        (Path("runs/base"), "runs/base"),
        (LoRAExpert, "modular_experts.experts.lora.LoRAExpert"),
        (Task(path="a.jsonl", weight=2.0), {"name": "a", "path": "a.jsonl", "weight": 2.0}),
    ],
)
def test_what_stands_for_an_object_is_what_yaml_holds(value, settings) -> None:
    found = as_config(value)
    assert {**found, **settings} == found if isinstance(settings, dict) else found == settings


@pytest.mark.parametrize(
    ("word", "tasks"),
    [
        ("[ab].jsonl", [{"path": "a.jsonl"}, {"path": "b.jsonl"}]),
        ("a.jsonl", [{"path": "a.jsonl"}]),
        ("Saved", [{"path": "Saved"}]),
        ("FirstTwo", [{"name": "first-two", "source": "FirstTwo"}]),
        ("owner/name", [{"hub": "owner/name"}]),
        ("here/name", [{"path": "here/name"}]),
        ("owner/gone.jsonl", [{"path": "owner/gone.jsonl"}]),
    ],
)
def test_a_word_names_tasks_by_its_form(tmp_path, monkeypatch, word, tasks) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("Saved", "here"):
        Path(folder).mkdir()
    for file in ("a.jsonl", "b.jsonl", "Saved/dataset_info.json", "here/name"):
        Path(file).touch()
    assert named_tasks(word) == tasks


@pytest.fixture
def drawn(tmp_path):
    """Return the members of the groups of a study of six tasks, by its `counts`, the size of a group and the seed."""
    files = [write_rows(tmp_path / f"{name}.jsonl", [{"input": name, "target": name}]) for name in "abcdef"]

    def members(counts, size: int, seed: int = 0) -> list[tuple[str, ...]]:
        study = read_study("base", [str(file) for file in files], {"lora": {"expert": LoRAExpert}}, counts=counts)
        return [tuple(group.own) for group in groups(study, "lora", size, seed)]

    return members


@pytest.mark.parametrize("counts", [{3: 10}, {"3": "10 draws"}, [{3: 10}, "all"], [2, {3: "10 draws"}]])
def test_random_groups_differ_and_come_again(drawn, counts) -> None:
    found = drawn(counts, 3)
    assert len({frozenset(group) for group in found}) == 10
    assert all(len({*group}) == 3 for group in found)
    assert drawn(counts, 3) == found
    assert drawn(counts, 3, seed=1) != found
    assert drawn({3: 4}, 3) == found[:4]


def test_groups_that_are_not_drawn_are_disjoint_and_the_group_of_all_experts_is_the_same_if_it_is_drawn(drawn) -> None:
    assert drawn({"all": 1}, 6) == drawn([{6: 1}], 6) == drawn(["all"], 6)
    pairs = [drawn([2, "all"], 2, seed) for seed in (0, 0, 1)]
    assert pairs[0] == pairs[1] != pairs[2]
    assert sorted(name for group in pairs[0] for name in group) == [*"abcdef"]


def test_all_groups_are_taken_if_there_are_fewer_than_draws(drawn, caplog) -> None:
    assert {frozenset(group) for group in drawn({5: 10}, 5)} == {frozenset("abcdef") - {one} for one in "abcdef"}
    sentence = "counts: 6 experts have only 6 different groups of 5, so the study takes each once instead of 10 draws"
    assert caplog.messages == [sentence]
