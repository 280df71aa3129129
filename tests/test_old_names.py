"""Class paths of version 1, in records, recipes and configs, mean the classes where they are now."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from testbed.random_deltas import random_delta

import modular_experts
from modular_experts.library import make_record, open_expert, write_expert
from modular_experts.library.described import describe
from modular_experts.merger.merged import merge
from modular_experts.merger.remove import remove
from modular_experts.methods import TIES, Average, MagnitudePrune
from modular_experts.old_names import MOVED, current_name

BASE = {"id": "base", "revision": None, "fingerprint": "a" * 64}


@pytest.fixture
def library(tmp_path):
    for seed, name in enumerate(("one", "two", "three")):
        deltas = [("a.weight", random_delta("Sparse", (12, 15), seed, torch.float32))]
        write_expert(tmp_path / name, deltas, make_record("X", BASE, tasks=[name]))
    return tmp_path


def test_every_new_module_exists_and_no_old_one_does() -> None:
    root = Path(modular_experts.__file__).parent.parent
    for old, new in MOVED.items():
        assert importlib.util.find_spec(new), f"{old} should be {new} now"
        assert not (root / old.replace(".", "/")).with_suffix(".py").exists(), old


def test_the_longest_old_prefix_counts() -> None:
    assert current_name("modular_experts.merging.ties.TIES") == "modular_experts.methods.ties.TIES"
    assert current_name("modular_experts.merging.task_arithmetic.TaskArithmetic").endswith(
        "methods.average.TaskArithmetic"
    )
    assert current_name("modular_experts.search.ada_merging.AdaMerging") == (
        "modular_experts.tuning.gradient_search.AdaMerging"
    )
    assert current_name("modular_experts.learning_rate.Linear") == "modular_experts.training.learning_rate.Linear"
    for other in ("modular_experts.methods.ties.TIES", "my_merging.ties.TIES", "merging.ties", ""):
        assert current_name(other) == other


def test_an_expert_is_removed_from_a_merge_of_version_1(library) -> None:
    merge([library / name for name in ("one", "two", "three")], Average(), library / "all")
    file = library / "all" / "expert.json"
    record = json.loads(file.read_text())
    record["method"]["class_path"] = "modular_experts.merging.average.Average"
    file.write_text(json.dumps(record))
    left = remove(library / "all", library / "one", library / "rest")
    again = merge([library / "two", library / "three"], Average(), library / "again")
    torch.testing.assert_close(left["a.weight"].dense(), again["a.weight"].dense(), rtol=2e-5, atol=1e-5)
    assert left.record["method"] == again.record["method"]


RECIPE = """\
experts: [one, two]
out: merged
method:
  class_path: modular_experts.merging.ties.TIES
  init_args: {keep: 0.5, scale: 2.0, rescale: none, weights: null}
per_weight:
  a.weight: {class_path: modular_experts.merging.magnitude_prune.MagnitudePrune, init_args: {keep: null, scale: 2.0}}
"""


def test_the_command_line_takes_a_recipe_of_version_1(library) -> None:
    (library / "recipe.yaml").write_text(RECIPE)
    command = [sys.executable, "-m", "modular_experts", "merge", "--config", "recipe.yaml"]
    done = subprocess.run(command, cwd=library, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = open_expert(library / "merged").record
    assert record["method"]["class_path"] == "modular_experts.methods.ties.TIES"
    assert record["method"]["init_args"] == describe(TIES(keep=0.5, scale=2.0))["init_args"]
    assert record["per_weight"]["a.weight"] == describe(MagnitudePrune(scale=2.0))
