"""Run the whole quickstart as a newcomer does, and check what it shows: minutes of training; `make test-quickstart`.

The facts are paired differences within one seed, with margins below those seen over several seeds. Which gradient rule
is best, and whether sparse experts beat LoRA alone, is not among them: that is noise here.
"""

import itertools
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from statistics import fmean

import pytest
from lightning.pytorch import seed_everything
from testbed.runs import trainer
from torch.optim import AdamW

from modular_experts.data import Task, TaskMixture, suite
from modular_experts.evaluation import measure
from modular_experts.experts import SparseExpert
from modular_experts.library import Library
from modular_experts.masks import RandomScore, SelectOnce
from modular_experts.reports import Results
from modular_experts.selection.mask_schedule import MaskSchedule
from modular_experts.study.quickstart import description
from modular_experts.training.module import ExpertModule

pytestmark = pytest.mark.quickstart

STUDY = description()
TASKS = [(role, task) for role, tasks in STUDY["tasks"].items() for task in tasks]
HELD_IN = {task["name"]: task["source"]["class_path"] for role, task in TASKS if role == "held_in"}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("newcomer")
    command = [sys.executable, "-m", "modular_experts", "quickstart"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (place / "output.txt").write_text(done.stdout)
    (place / "progress.txt").write_text(done.stderr)
    return place / "runs/quickstart"


@pytest.fixture(scope="module")
def results(place) -> Results:
    return Results.read(place / "results.json")


def single(results: Results, kind: str) -> float:
    return results.mean("exact_match", kind=kind, merge=None)


def base(results: Results, role: str = "held_in") -> float:
    return results.mean("exact_match", model="base", role=role)


def merged(results: Results, kind: str, merge: str, role: str = "held_in", count: int = 20) -> float:
    return results.mean("exact_match", kind=kind, merge=merge, count=count, role=role)


def test_the_base_has_the_skill_and_another_format(place, results) -> None:
    assert base(results) < 0.15
    facts = json.loads((place / "base/training.json").read_text())
    assert facts["latent"]["held_in"]["exact_match"] > 0.65


@pytest.mark.parametrize("kind", STUDY["experts"])
def test_every_kind_of_expert_learns_its_task(results, kind: str) -> None:
    assert single(results, kind) > 0.6
    assert single(results, kind) > base(results) + 0.5


def test_the_overlap_aware_merge_of_sparse_experts_beats_plain_averages(results) -> None:
    overlap = merged(results, "sparse", "SparseAverage at 1")
    assert overlap > merged(results, "full", "Average at 1") + 0.05
    assert overlap > merged(results, "sparse", "Average at 1") + 0.2


def test_a_merge_helps_tasks_that_no_expert_saw(results) -> None:
    assert merged(results, "sparse", "SparseAverage at 1", "held_out") > base(results, "held_out") + 0.3


def test_two_experts_merge_better_than_twenty(results) -> None:
    for kind in STUDY["experts"]:
        assert merged(results, kind, "Average", count=2) > merged(results, kind, "Average")


def test_gradients_choose_better_entries_than_chance(place) -> None:
    """At 5 % kept, on every third task, both at the rate that suits this share."""
    tasks = list(HELD_IN)[::3]
    by_gradient = fmean(_exact_match(place, task, MaskSchedule(batches=1)) for task in tasks)
    by_chance = fmean(_exact_match(place, task, MaskSchedule(RandomScore(), SelectOnce())) for task in tasks)
    assert by_gradient > by_chance + 0.02


def _exact_match(place: Path, task: str, schedule: MaskSchedule) -> float:
    seed_everything(0, verbose=False)
    optimizer = partial(AdamW, lr=2e-3, weight_decay=0.0)
    module = ExpertModule(
        str(place / "base"), STUDY["fit"]["modules"], partial(SparseExpert, keep_ratio=0.05), optimizer=optimizer
    )
    words = Task(task, source=getattr(suite, HELD_IN[task])())
    data = TaskMixture([words], str(place / "base"), batch_size=16, eval_batch_size=448, seed=0)
    how = {"max_steps": 50, "gradient_clip_val": 1.0, "limit_val_batches": 0}
    trainer(place, schedule, **how).fit(module, data)
    data.setup("test")
    scores = measure(module.model, module.tokenizer, data.test_dataloader(), data.roles, max_new_tokens=10)
    return scores["tasks"][task]["exact_match"]


def test_the_directory_holds_what_is_promised(place) -> None:
    promised = {"base", "library", "results.json", "quickstart.svg", "report.html"}
    assert promised <= {path.name for path in place.iterdir()}
    assert len(Library(place / "library")) == 4 * 20 + 1 + 2 * 14
    shown = (place.parents[1] / "output.txt").read_text()
    assert f"the page is {Path('runs/quickstart/report.html')}" in shown
    progress = (place.parents[1] / "progress.txt").read_text()
    assert "training a small base: " in progress
    assert " pieces done, about " in progress
    assert all(len(line) <= 80 for line in (shown + progress).splitlines() if "file://" not in line)


def test_a_stored_merge_tests_as_the_results_say(place, results) -> None:
    """The command, on the same words, finds what the quickstart found."""
    tasks = [{"name": task["name"], "source": task["source"]["class_path"], "role": role} for role, task in TASKS]
    settings = {
        "--model.base": "runs/quickstart/base",
        "--model.applied": "[runs/quickstart/library/merge-sparse-SparseAverage]",
        "--model.max_new_tokens": "10",
        "--tasks": json.dumps(tasks),
        "--data.eval_batch_size": "100",
    }
    command = [sys.executable, "-m", "modular_experts", "test", *itertools.chain.from_iterable(settings.items())]
    subprocess.run(command, cwd=place.parents[1], capture_output=True, check=True)
    found = json.loads((place.parents[1] / "runs/results.json").read_text())
    for role in ("held_in", "held_out"):
        wanted = merged(results, "sparse", "SparseAverage", role)
        assert found[role]["exact_match"] == pytest.approx(wanted, abs=0.003)  # near ties may fall otherwise


def test_a_second_run_is_quick_and_ends_alike(place) -> None:
    before = (place / "results.json").read_bytes()
    command = [sys.executable, "-m", "modular_experts", "quickstart"]
    done = subprocess.run(command, cwd=place.parents[1], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == (place.parents[1] / "output.txt").read_text().splitlines()[-1]
    assert (place / "results.json").read_bytes() == before
