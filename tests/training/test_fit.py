"""`fit` in one call: it trains what the Lightning form trains, and refuses what that form refuses."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from testbed import runs

from modular_experts import ExpertModule, ExportExpert, TaskMixture, check_fit, estimate_fit, fit
from modular_experts.experts import LoRAExpert, SparseExpert
from modular_experts.library import open_expert

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_is_the_lightning_form_with_its_callbacks_chosen(place, tiny_llama_dir, task_files) -> None:
    files = [str(path) for path in task_files.values()][:1]
    expert = partial(LoRAExpert, rank=2, dropout=0.1)
    found = fit(tiny_llama_dir, files, expert, runs.TARGET, "library/a", steps=4, batch_size=4, trainer=QUIET)
    seed_everything(0, workers=True, verbose=False)
    settings = QUIET | {"max_steps": 4, "use_distributed_sampler": False, "enable_model_summary": False}
    trainer = Trainer(callbacks=[ExportExpert("library", "b")], **settings)
    trainer.fit(ExpertModule(str(tiny_llama_dir), runs.TARGET, expert), TaskMixture(files, str(tiny_llama_dir), 4))
    other = open_expert("library/b")
    assert found.path.name == "a"
    assert found.keys() == other.keys()
    assert all(torch.equal(found[name].dense(), other[name].dense()) for name in found)
    assert found.record["scores"] == other.record["scores"]


def test_without_a_place_only_a_listed_export_keeps_the_expert(place, tiny_llama_dir, task_files) -> None:
    how = {"steps": 2, "batch_size": 4}
    tasks = [str(path) for path in task_files.values()][:1]
    assert fit(tiny_llama_dir, tasks, SparseExpert, runs.TARGET, **how, trainer=QUIET) is None
    listed = QUIET | {"callbacks": [ExportExpert("library", "mine", monitor=None)]}
    found = fit(tiny_llama_dir, tasks, SparseExpert, runs.TARGET, **how, trainer=listed)
    assert (found.name, found.record["hyperparameters"]["steps"]) == ("mine", 2)


def test_without_modules_an_expert_is_a_plan(place, tiny_llama_dir, task_files) -> None:
    tasks = [str(path) for path in task_files.values()][:1]
    plan = {r".*\.q_proj": LoRAExpert}
    found = fit(tiny_llama_dir, tasks, plan, out="library/a", steps=2, batch_size=4, trainer=QUIET)
    assert all("q_proj" in name for name in found)
    with pytest.raises(ValueError, match="expert is given but not modules"):
        fit(tiny_llama_dir, tasks, LoRAExpert, out="library/b", steps=2, trainer=QUIET)


def test_an_expert_that_exists_is_refused_before_anything_is_read(place, tiny_llama_dir, task_files) -> None:
    tasks = [str(path) for path in task_files.values()][:1]
    how = {"steps": 2, "batch_size": 4, "trainer": QUIET}
    fit(tiny_llama_dir, tasks, LoRAExpert, runs.TARGET, "library/a", **how)
    with pytest.raises(FileExistsError, match="library/a exists already"):
        fit("nowhere", ["missing.jsonl"], LoRAExpert, runs.TARGET, "library/a", **how)
    assert fit(tiny_llama_dir, tasks, LoRAExpert, runs.TARGET, "library/a", overwrite=True, **how) is not None


def test_a_check_reads_neither_base_nor_rows(place) -> None:
    check_fit("nowhere", ["missing.jsonl"], LoRAExpert, ["q_proj"], "library/a", steps=2)
    assert not list(place.iterdir())
    with pytest.raises(ValueError, match=r"learning_rate=-1.* must be above 0"):
        check_fit("nowhere", ["missing.jsonl"], LoRAExpert, ["q_proj"], learning_rate=-1.0)
    with pytest.raises(ValueError, match="is not a checkpoint; give its file"):
        check_fit("nowhere", ["missing.jsonl"], LoRAExpert, ["q_proj"], checkpoint="last")


def test_an_estimate_trains_and_writes_nothing(place, tiny_llama_dir, task_files) -> None:
    tasks = [str(path) for path in task_files.values()][:1]
    found = estimate_fit(tiny_llama_dir, tasks, LoRAExpert, runs.TARGET, "library/a", steps=5, trainer=QUIET)
    assert found.length.total_steps == 5
    assert [str(place) for kind, place in found.places if kind == "the expert"] == ["library/a"]
    assert not list(place.iterdir())


def test_a_mixture_takes_no_second_batch_size(place, tiny_llama_dir, task_files) -> None:
    mixture = TaskMixture([str(task_files["upper"])], str(tiny_llama_dir), 4)
    with pytest.raises(ValueError, match="a TaskMixture has its own batch_size; set that in it"):
        check_fit(str(tiny_llama_dir), mixture, LoRAExpert, runs.TARGET, batch_size=8)
