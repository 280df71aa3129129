"""A piece of a study gives the same whatever ran before it, and a stored one equals a fresh one after any change.

Each change is of something that a setting names: a class, a file, an expert, a library, a tokenizer.
"""

import json
import random
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_rows
from testbed.here import Apart, Here
from testbed.random_deltas import write_random

from modular_experts.cli.words import annotations
from modular_experts.data import Task, TaskMixture
from modular_experts.library import Library
from modular_experts.selection.mask_schedule import MaskSchedule
from modular_experts.study import read_study, results_of, run_study
from modular_experts.training.gradient_mask import GradientMask
from modular_experts.training.module import ExpertModule
from modular_experts.training.train_under_others import TrainUnderOthers

RANDOM = {"class_path": "MaskSchedule", "init_args": {"score": "RandomScore", "rule": "SelectOnce"}}
DRAWN = {"class_path": "testbed.own_files.DrawnScale"}
SPARSE = {"expert": "SparseExpert", "modules": ["q_proj"], "steps": 1}
LORA = {"expert": {"class_path": "LoRAExpert", "init_args": {"rank": 2}}, "modules": ["q_proj"], "steps": 1}
KINDS = {
    "sparse": SPARSE | {"trainer": {"callbacks": [RANDOM]}},
    "lora": LORA | {"trainer": {"callbacks": [DRAWN]}},
}
MERGES = [{"class_path": "DARE", "init_args": {"keep": 0.5}}]


@pytest.fixture
def place(tmp_path, one_block, monkeypatch) -> Path:
    """The current directory, with a base, two tasks, two other experts, a tokenizer, and a file with a number."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(one_block, "base")
    for name in ("a", "b"):
        splits = ["train", "train", "validation", "test"]
        rows = [
            {"input": f"{name}{number}", "target": str(number), "choices": list("0123"), "split": split}
            for number, split in enumerate(splits)
        ]
        write_rows(Path(f"{name}.jsonl"), rows)
        write_other(Path("library", name), 0)
    shutil.copytree(one_block, "tokens")
    Path("number.txt").write_text("2")
    return tmp_path


def write_other(path: Path, seed: int) -> None:
    weights = {"model.layers.0.self_attn.q_proj.weight": (32, 32)}
    write_random(path, Path("base"), weights, seed, [f"other-{path.name}"])


def results(out: str, executor: Any = None, **changes: Any) -> dict[tuple[Any, ...], Any]:
    """Run a study in a folder; return each number by kind, merge, task, metric and seed, and each expert's hash."""
    tasks = {"held_in": ["a.jsonl", "b.jsonl"]}
    settings = {"base": "base", "tasks": tasks, "experts": KINDS, "merges": MERGES, "max_new_tokens": 1} | changes
    study = read_study(**settings)
    state = run_study(study, out, executor=executor or Here())
    assert not state.failed, [failure.sentence for failure in state.failed.values()]
    rows = results_of(study, state).rows
    numbers = {(row["kind"], row["merge"], row["task"], row["metric"], row["seed"]): row["value"] for row in rows}
    return numbers | {(name,): expert.content_hash for name, expert in Library(f"{out}/library").items()}


def test_pieces_do_not_depend_on_order_processes_or_interruptions(place) -> None:
    forwards = results("forwards", seeds=[1, 2])
    # Whatever the process has drawn between two pieces must not matter either.
    torch.manual_seed(99)
    random.seed(99)
    others = results("others", seeds=[3, 2])
    shared = {key for key in forwards if key[-1] == 2 or (len(key) == 1 and key[0].endswith("-seed2"))}
    assert {key: others[key] for key in shared} == {key: forwards[key] for key in shared}
    assert others["sparse-a-seed2",] != others["sparse-a-seed3",]
    assert others["lora-a-seed2",] != others["lora-a-seed3",]

    class Stops(Here):
        """Stops the study after three pieces."""

        count = 0

        def submit(self, fn, /, *args, **kwargs):
            self.count += 1
            if self.count > 3:
                raise KeyboardInterrupt
            return super().submit(fn, *args, **kwargs)

    with pytest.raises(KeyboardInterrupt):
        results("stopped", Stops(), seeds=[1, 2])
    assert results("stopped", seeds=[1, 2]) == forwards
    assert results("apart and backwards", Apart(), seeds=[2, 1]) == forwards


def calls(name: str, **settings: Any) -> dict[str, Any]:
    """Return the settings of a callback in the place of a kind's own."""
    return {"trainer": {"callbacks": [{"class_path": name, "init_args": settings}]}}


def reads(name: str) -> dict[str, Any]:
    """Return the settings of one of the classes that read a number in a file."""
    return {"class_path": f"testbed.own_files.{name}", "init_args": {"file": "number.txt"}}


def write_rows_anew() -> None:
    file = Path("a.jsonl")
    file.write_text(file.read_text().replace("a1", "c1"))


def swap_two_tokens() -> None:
    file = Path("tokens/tokenizer.json")
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["1"], vocabulary["x"] = vocabulary["x"], vocabulary["1"]
    file.write_text(json.dumps(content))


FULL = SPARSE | {"expert": "FullExpert"}
PREFERENCE = {"model": {"loss": reads("OwnLoss")}}
# Each setting that names something, a kind of expert or other settings of a study that use it, and what changes.
OF_KINDS: dict[str, tuple[Mapping[str, Any], str]] = {
    "ExpertModule.applied": (FULL | {"applied": ["library/a"]}, "expert a"),
    "ExpertModule.expert": (LORA | {"expert": reads("StartedLoRA")}, "number"),
    "ExpertModule.experts": ({"model": {"experts": {"q_proj": reads("StartedLoRA")}}, "steps": 1}, "number"),
    "ExpertModule.optimizer": (FULL | {"model": {"optimizer": reads("OwnSGD")}}, "number"),
    "ExpertModule.scheduler": (FULL | {"model": {"scheduler": reads("OwnShape")}}, "number"),
    "ExpertModule.loss": (FULL | PREFERENCE, "number"),
    "TaskMixture.tokenizer": (FULL | {"data": {"tokenizer": "tokens"}}, "tokenizer"),
    "TaskMixture.mixing": (FULL | {"data": {"mixing": reads("OwnMixing")}}, "number"),
    "MaskSchedule.score": (SPARSE | calls("MaskSchedule", score=reads("OwnScore")), "number"),
    "MaskSchedule.rule": (SPARSE | calls("MaskSchedule", rule=reads("OwnRule")), "number"),
    "MaskSchedule.support": (SPARSE | calls("MaskSchedule", support="library/a"), "expert a"),
    "TrainUnderOthers.others": (SPARSE | calls("TrainUnderOthers", others="library", count=2), "expert b"),
    "GradientMask.masks": (FULL | calls("GradientMask", masks="library/a"), "expert a"),
    "Trainer.callbacks": (FULL | calls("testbed.own_files.ScaledGradients", file="number.txt"), "number"),
}
OF_TASKS: dict[str, tuple[Any, str]] = {
    "Task.path": ("a.jsonl", "rows"),
    "Task.source": ({"name": "sums", "source": reads("Rows")}, "number"),
}
OF_MERGES: dict[str, tuple[Any, str]] = {
    "method": (reads("ScaledSum"), "number"),
    "route": ({"route": reads("OwnConstant")}, "number"),
}
MAKE_OTHERS: dict[str, Callable[[], object]] = {
    "expert a": lambda: write_other(Path("library/a"), 5),
    "expert b": lambda: write_other(Path("library/b"), 5),
    "number": lambda: Path("number.txt").write_text("3"),
    "tokenizer": swap_two_tokens,
    "rows": write_rows_anew,
}
# These count as the words that they are: patterns, names, and what is read from the hub at a revision.
WORDS = {
    *("ExpertModule.base", "ExpertModule.modules", "ExpertModule.revision", "ExpertModule.metrics"),
    *("TaskMixture.tasks", "Task.name", "Task.hub", "Task.subset", "Task.revision", "Task.columns", "Task.where"),
    *("Task.template", "Task.choices"),
}


def test_every_setting_that_may_name_something_is_changed_below() -> None:
    known = {*OF_KINDS, *OF_TASKS, *WORDS}
    for kind in (ExpertModule, TaskMixture, Task, MaskSchedule, TrainUnderOthers, GradientMask):
        for name, hint in annotations(kind.__init__).items():
            plain = str(hint).replace("NoneType", "")
            names_something = "Literal" not in plain and re.search(r"str|modular_experts|Callable|Path", plain)
            assert not names_something or f"{kind.__name__}.{name}" in known, f"{kind.__name__}.{name}: {hint}"


@pytest.mark.parametrize("name", [*OF_KINDS, *OF_TASKS, *OF_MERGES])
def test_a_stored_piece_equals_a_fresh_one_after_a_change(name, place) -> None:
    kind, task, merges = FULL, "a.jsonl", []
    changed = ""
    if name in OF_KINDS:
        kind, changed = OF_KINDS[name]
    elif name in OF_TASKS:
        task, changed = OF_TASKS[name]
    else:
        merge, changed = OF_MERGES[name]
        merges = [merge]
    tasks = {"held_in": [task, "b.jsonl"] if merges else [task]}
    how: dict[str, Any] = {"tasks": tasks, "experts": {"kind": dict(kind)}, "merges": merges}
    before = results("kept", **how)
    MAKE_OTHERS[changed]()
    after = results("kept", **how)
    assert after == results("fresh", **how)
    # One task is all of a mixture, and a rule that chooses once has nothing to read.
    assert (after != before) == (name not in ("TaskMixture.mixing", "MaskSchedule.rule"))


def test_a_study_refuses_what_it_writes_itself_in_its_first_run_too(place) -> None:
    experts = {"first": FULL, "second": FULL | {"applied": ["own/library/first-a"]}}
    with pytest.raises(ValueError, match=r"experts\.second names own/library/first-a, where this study writes itself"):
        results("own", tasks={"held_in": ["a.jsonl"]}, experts=experts, merges=[])
