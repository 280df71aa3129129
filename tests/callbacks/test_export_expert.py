"""ExportExpert: the best or last state, its record, and names refused before training."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from testbed import runs

from modular_experts.callbacks import ExportExpert, MaskSchedule
from modular_experts.experts import MaskedExpert, SparseExpert
from modular_experts.library import Library, open_expert
from modular_experts.masks import DenseThenSparse

SPARSE = partial(SparseExpert, keep_ratio=0.1)


def test_the_best_state_is_exported_and_nothing_else_left(tiny_llama_dir, task_files, tmp_path) -> None:
    """Validation after every second step; the rate turns negative, so that training climbs again from a state in the
    middle.
    """
    states = {}

    class Remember(runs.Losses):
        def on_validation_end(self, trainer, pl_module) -> None:
            if not trainer.sanity_checking:
                score = float(trainer.callback_metrics["val_loss"])
                states[trainer.global_step] = (score, {n: d.dense().clone() for n, d in pl_module.task_vector()})

    export, remember = ExportExpert(str(tmp_path / "library"), "mine"), Remember()
    module = runs.module(
        tiny_llama_dir,
        SPARSE,
        optimizer=partial(torch.optim.SGD, lr=1.0),
        scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: -1.0 if step > 5 else 1.0),
    )
    trainer = runs.trainer(tmp_path, remember, export, max_steps=10, val_check_interval=2)
    trainer.fit(module, runs.mixture(task_files, tiny_llama_dir))
    best = min(states, key=lambda step: states[step][0])
    assert best < 10
    stored = open_expert(export.target)
    assert all(torch.equal(stored[name].dense(), dense) for name, dense in states[best][1].items())
    assert stored.record["scores"]["val_loss"] == pytest.approx(states[best][0])
    assert not list(tmp_path.glob("best-of-*"))


def test_the_last_state_is_exported_without_a_monitor_and_recorded(tiny_llama_dir, task_files, tmp_path) -> None:
    export = ExportExpert(str(tmp_path / "library"), "mine", monitor=None)
    module, _, _ = runs.fit(tiny_llama_dir, task_files, tmp_path, SPARSE, export)
    stored = open_expert(export.target)
    for name, delta in module.task_vector():
        assert torch.equal(stored[name].dense(), delta.dense())
    record = json.loads((export.target / "expert.json").read_text())
    assert record["kind"] == "SparseExpert"
    assert record["base"] == {"id": str(tiny_llama_dir), "revision": None, "fingerprint": module.fingerprint}
    assert record["tasks"] == ["reverse", "upper"]
    assert record["seed"] == 0
    settings = record["hyperparameters"]
    assert (settings["keep_ratio"], settings["granularity"], settings["learning_rate"]) == (0.1, "element", 1e-2)
    assert settings["steps"] == 6
    assert 0.09 < settings["kept"] < 0.11


def test_the_line_tells_the_losses_of_the_kept_and_of_the_last_step(
    tiny_llama_dir, task_files, tmp_path, caplog
) -> None:
    caplog.set_level("INFO", "modular_experts")
    export = ExportExpert(str(tmp_path / "library"), "mine")
    runs.fit(tiny_llama_dir, task_files, tmp_path, SPARSE, export, max_steps=6)
    assert f"exported step 6, the last, with validation loss {export.best:.4g} to {export.target}" in caplog.messages
    rates = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: -1.0 if step > 5 else 1.0)
    worse = ExportExpert(str(tmp_path / "library"), "worse")
    module = runs.module(tiny_llama_dir, SPARSE, optimizer=partial(torch.optim.SGD, lr=1.0), scheduler=rates)
    runs.trainer(tmp_path, worse, max_steps=12).fit(module, runs.mixture(task_files, tiny_llama_dir))
    assert worse.best_step == 6
    line = f"exported step 6 with validation loss {worse.best:.4g} to {worse.target}; the last step, 12, had"
    assert f"{line} {worse.newest:.4g}" in caplog.messages


def test_a_state_that_trains_more_than_the_expert_keeps_is_never_the_best(tiny_llama_dir, task_files, tmp_path) -> None:
    """All entries are trained up to step 8 of 12, and validations come before."""
    export, seen = ExportExpert(str(tmp_path / "library"), "mine"), []

    class Remember(runs.Losses):
        def on_validation_end(self, trainer, pl_module) -> None:
            seen.append((trainer.global_step, export.best_step))

    schedule = MaskSchedule(rule=DenseThenSparse(dense=0.6))
    dense = partial(MaskedExpert, keep_ratio=0.1)
    runs.fit(tiny_llama_dir, task_files, tmp_path, dense, export, Remember(), schedule, max_steps=12)
    assert [best for step, best in seen if step < 8] == [0] * sum(step < 8 for step, _ in seen) != []
    assert open_expert(export.target).kept_share == pytest.approx(0.1, abs=0.01)


def test_the_record_tells_how_the_expert_was_trained(tiny_llama_dir, task_files, tmp_path) -> None:
    export = ExportExpert(str(tmp_path / "library"), "mine")
    settings = {"max_steps": 3, "accumulate_grad_batches": 2}
    runs.fit(tiny_llama_dir, task_files, tmp_path, SPARSE, export, **settings)
    training = open_expert(export.target).record["training"]
    data = runs.mixture(task_files, tiny_llama_dir)
    rows = {"train": 12, "validation": 6, "test": 6}
    assert {name: task["rows"] for name, task in training.pop("data").items()} == {"upper": rows, "reverse": rows}
    assert training == {
        **{"batch_size": 4, "accumulate_grad_batches": 2, "rows": 24, "dtype": "float32", "precision": "32-true"},
        **{"max_length": data.max_length, "chat_template": None, "config": None},
    }


def test_an_existing_name_is_refused_before_training(tiny_llama_dir, task_files, tmp_path) -> None:
    library = str(tmp_path / "library")
    runs.fit(tiny_llama_dir, task_files, tmp_path, SPARSE, ExportExpert(library, "mine"))
    losses = runs.Losses()
    with pytest.raises(FileExistsError, match="mine"):
        runs.fit(tiny_llama_dir, task_files, tmp_path, SPARSE, ExportExpert(library, "mine"), losses)
    assert losses.steps == []
    before = Library(library)["mine"].record["content_hash"]
    runs.fit(tiny_llama_dir, task_files, tmp_path, SPARSE, ExportExpert(library, "mine", overwrite=True), max_steps=2)
    assert Library(library)["mine"].record["content_hash"] != before


def test_a_metric_that_is_not_logged_is_refused_with_the_nearest(tiny_llama_dir, task_files, tmp_path) -> None:
    export, losses = ExportExpert(str(tmp_path / "library"), "mine", monitor="val_los"), runs.Losses()
    with pytest.raises(
        ValueError, match=r"monitor='val_los' is not a logged metric; did you mean val_loss\?; choose from"
    ):
        runs.fit(tiny_llama_dir, task_files, tmp_path, SPARSE, export, losses, val_check_interval=1, max_steps=6)
    assert len(losses.steps) == 1, "the first validation that counts finds out"


def test_a_place_that_cannot_be_written_to_is_refused_before_training(tiny_llama_dir, task_files, tmp_path) -> None:
    losses = runs.Losses()
    with pytest.raises(OSError, match=r"/proc/library/mine cannot be written: in /proc, "):
        runs.fit(tiny_llama_dir, task_files, tmp_path, SPARSE, ExportExpert("/proc/library", "mine"), losses)
    assert losses.steps == []


class Interrupt(runs.Losses):
    """Stops training, as a person does, before its fifth step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == 4:
            raise KeyboardInterrupt


def test_an_interruption_tells_where_the_best_state_is_and_a_fresh_run_clears_it_away(
    tiny_llama_dir, task_files, tmp_path, caplog
) -> None:
    caplog.set_level("INFO", "modular_experts")
    library, best = str(tmp_path / "library"), tmp_path / "best-of-mine"
    first, often = ExportExpert(library, "mine"), {"max_steps": 9, "val_check_interval": 2}
    with pytest.raises(SystemExit):
        runs.fit(tiny_llama_dir, task_files, tmp_path, SPARSE, first, Interrupt(), **often)
    assert first.best_step in (2, 4)
    assert f"the best state so far, of step {first.best_step}, is an ordinary expert in {best}" in caplog.text
    open_expert(best).verify()
    fresh = ExportExpert(library, "mine", monitor=None)
    runs.fit(tiny_llama_dir, task_files, tmp_path, SPARSE, fresh)
    assert not best.exists()
    assert open_expert(fresh.target).record["hyperparameters"]["steps"] == 6


def test_a_name_that_leaves_the_library_is_refused() -> None:
    with pytest.raises(ValueError, match="name"):
        ExportExpert("library", "../outside")
