"""ExportExpert: the best or last state, its record, and names refused before training."""

import json
import math
import shutil
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from testbed import runs

from modular_experts.experts import LoRAExpert, MaskedExpert, SparseExpert
from modular_experts.library import Library, open_expert
from modular_experts.masks import Reselect
from modular_experts.selection.mask_schedule import MaskSchedule
from modular_experts.training.export_expert import ExportExpert

SPARSE = partial(SparseExpert, keep_ratio=0.1)
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists", "ignore:The dirpath has changed")


def test_the_best_state_is_exported_and_nothing_else_left(one_block, task_files, tmp_path) -> None:
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
    rates = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: -1.0 if step > 5 else 1.0)
    own = {"optimizer": partial(torch.optim.SGD, lr=1.0), "scheduler": rates}
    how = {"max_steps": 10, "val_check_interval": 2}
    runs.fit(one_block, task_files, tmp_path, SPARSE, remember, export, own=own, **how)
    best = min(states, key=lambda step: states[step][0])
    assert best < 10
    stored = open_expert(export.target)
    assert all(torch.equal(stored[name].dense(), dense) for name, dense in states[best][1].items())
    assert stored.record["scores"]["val_loss"] == pytest.approx(states[best][0])
    assert not list(tmp_path.glob("best-of-*"))


def test_the_last_state_is_exported_without_a_monitor_with_a_record_of_how_it_was_trained(
    fitted, tiny_llama_dir, tmp_path
) -> None:
    export = ExportExpert(str(tmp_path / "library"), "mine", monitor=None)
    module, trainer, _ = fitted(SPARSE, export, max_steps=3, accumulate_grad_batches=2)
    stored = open_expert(export.target)
    for name, delta in module.task_vector():
        assert torch.equal(stored[name].dense(), delta.dense())
    record = json.loads((export.target / "expert.json").read_text())
    assert record["kind"] == "SparseExpert"
    base = {"id": str(tiny_llama_dir), "revision": None, "fingerprint": module.fingerprint}
    assert record["base"] == base | {"rows": module.model.config.vocab_size}
    assert record["tasks"] == ["reverse", "upper"]
    assert record["seed"] == 0
    settings = record["hyperparameters"]
    assert (settings["keep_ratio"], settings["granularity"], settings["learning_rate"]) == (0.1, "element", 1e-2)
    assert settings["steps"] == 3
    assert 0.09 < settings["kept"] < 0.11
    training, rows = record["training"], {"train": 12, "validation": 6, "test": 6}
    assert {name: task["rows"] for name, task in training.pop("data").items()} == {"upper": rows, "reverse": rows}
    assert training == {
        **{"batch_size": 4, "accumulate_grad_batches": 2, "rows": 24, "dtype": "float32", "precision": "32-true"},
        **{"max_length": trainer.datamodule.max_length, "chat_template": None, "config": None},
    }


def test_a_state_that_trains_more_than_the_expert_keeps_is_never_the_best(one_block, task_files, tmp_path) -> None:
    """All entries are trained up to step 8 of 12, and validations come before."""
    export, seen = ExportExpert(str(tmp_path / "library"), "mine"), []

    class Remember(runs.Losses):
        def on_validation_end(self, trainer, pl_module) -> None:
            seen.append((trainer.global_step, export.best_step))

    schedule = MaskSchedule(rule=Reselect(every=8, until=1.0))
    dense = partial(MaskedExpert, keep_ratio=0.1)
    runs.fit(one_block, task_files, tmp_path, dense, export, Remember(), schedule, max_steps=12)
    assert [best for step, best in seen if step < 8] == [0] * sum(step < 8 for step, _ in seen) != []
    assert open_expert(export.target).kept_share == pytest.approx(0.1, abs=0.01)


def test_a_training_that_stops_before_the_choice_says_that_it_keeps_more(one_block, task_files, tmp_path, caplog):
    class Stop(runs.Losses):
        def on_train_batch_end(self, trainer, *rest) -> None:
            trainer.should_stop = trainer.global_step == self.at

    export, stop, said = ExportExpert(str(tmp_path / "library"), "mine", overwrite=True), Stop(), []
    for stop.at in (2, 10):
        caplog.clear()
        schedule = MaskSchedule(rule=Reselect(every=6, until=1.0))
        dense = partial(MaskedExpert, keep_ratio=0.1)
        runs.fit(one_block, task_files, tmp_path, dense, export, stop, schedule, max_steps=12)
        said.append([record.getMessage() for record in caplog.records if record.levelname == "WARNING"])
    warning = f"{export.target} holds more entries than its settings keep, because training ended at step 2, before"
    assert [len(one) for one in said] == [1, 0]
    assert said[0][0].startswith(warning)


def test_an_existing_name_is_refused_before_training(one_block, task_files, tmp_path) -> None:
    library = str(tmp_path / "library")
    runs.fit(one_block, task_files, tmp_path, SPARSE, ExportExpert(library, "mine"), max_steps=1)
    losses = runs.Losses()
    with pytest.raises(FileExistsError, match="mine"):
        runs.fit(one_block, task_files, tmp_path, SPARSE, ExportExpert(library, "mine"), losses)
    assert losses.steps == []
    before = Library(library)["mine"].record["content_hash"]
    runs.fit(one_block, task_files, tmp_path, SPARSE, ExportExpert(library, "mine", overwrite=True), max_steps=2)
    assert Library(library)["mine"].record["content_hash"] != before


class Interrupt(runs.Losses):
    """Stops training, as a person does, before its fifth step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == 4:
            raise KeyboardInterrupt


def _rising(base, files, folder, *callbacks, expert=SPARSE, steps=8, ckpt=None, **settings):
    """Train with a rate that turns negative: of the validations, one after each step, the fourth is the best."""
    rates = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: -1.0 if step > 3 else 1.0)
    own = {"optimizer": partial(torch.optim.SGD, lr=1.0), "scheduler": rates}
    settings = {"val_check_interval": 1, "enable_checkpointing": True, "max_steps": steps} | settings
    keep = {"filename": "{step}", "save_top_k": -1, "save_on_train_epoch_end": False, "enable_version_counter": False}
    saving = ModelCheckpoint(folder / "saved", **keep)
    runs.fit(base, files, folder, expert, *callbacks, saving, own=own, data={"seed": 0}, ckpt=ckpt, **settings)


def test_a_run_resumed_to_train_longer_or_no_more_keeps_the_best_state_of_before(
    one_block, task_files, tmp_path, caplog
) -> None:
    place = one_block, task_files, tmp_path
    first = ExportExpert(str(tmp_path / "library"), "mine")
    _rising(*place, first)
    before = open_expert(first.target).content_hash
    rest = ExportExpert(str(tmp_path / "library"), "mine", overwrite=True)
    _rising(*place, rest, ckpt=tmp_path / "saved" / "step=8.ckpt")
    assert rest.exported
    assert open_expert(rest.target).record["hyperparameters"]["steps"] == 4
    assert not list(tmp_path.glob("best-of-*"))
    again = ExportExpert(str(tmp_path / "library"), "mine", overwrite=True)
    longer = {"steps": 10, "ckpt": tmp_path / "saved" / "step=8.ckpt"}
    _rising(*place, again, **longer)
    assert (again.best, again.best_step) == (first.best, 4)
    assert open_expert(again.target).content_hash == before
    assert not list(tmp_path.glob("best-of-*"))
    # Without that state its score means nothing.
    shutil.rmtree(again.target)
    _rising(*place, again, **longer)
    assert again.best_step == 9
    assert again.best > first.best
    assert open_expert(again.target).record["scores"]["val_loss"] == pytest.approx(again.best)
    assert "the best state so far, of step 4, is gone" in caplog.text


class Worse(runs.Losses):
    """Lets the score rise with each validation."""

    def on_validation_end(self, trainer, pl_module) -> None:
        trainer.callback_metrics["mine"] = torch.tensor(float(trainer.global_step))


@pytest.mark.parametrize(("monitor", "best"), [("val_loss", 4), ("mine", 1)])
def test_a_step_whose_checkpoint_was_written_before_its_validation_may_be_the_best(
    monitor, best, one_block, task_files, tmp_path, caplog
) -> None:
    """The best may be the first that is validated, too."""

    def run(name: str, *callbacks, **how) -> ExportExpert:
        export = ExportExpert(str(tmp_path / "library"), name, monitor=monitor)
        # Lightning writes these after the optimizer's step, and validates later.
        early = {"every_n_train_steps": 1, "save_top_k": -1, "save_on_train_epoch_end": False}
        early = ModelCheckpoint(tmp_path / f"{name}-{len(how)}", "{step}", **early)
        _rising(one_block, task_files, tmp_path, Worse(), export, early, *callbacks, **how)
        return export

    whole = run("whole")
    assert whole.best_step == best
    with pytest.raises(SystemExit):
        run("mine", Interrupt())
    rest = run("mine", ckpt=tmp_path / "mine-0" / f"step={best}.ckpt")
    assert (rest.best, rest.best_step) == (whole.best, best)
    assert open_expert(rest.target).content_hash == open_expert(whole.target).content_hash
    assert "is gone" not in caplog.text


def test_runs_under_one_folder_keep_their_best_states_apart(one_block, task_files, tmp_path) -> None:
    """Within a run, another of that name starts and ends, and one whose name has the same beginning."""
    place, long = (one_block, task_files, tmp_path), "n" * 63

    class Within(runs.Losses):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if trainer.global_step == 6:
                for library, name in (("other", f"{long}a"), ("library", f"{long}b")):
                    lora = ExportExpert(str(tmp_path / library), name)
                    _rising(*place, lora, expert=partial(LoRAExpert, rank=2), steps=2)
                    assert lora.exported

    first = ExportExpert(str(tmp_path / "library"), f"{long}a")
    _rising(*place, first, Within())
    assert first.best_step == 4
    stored = open_expert(first.target)
    assert stored.record["kind"] == "SparseExpert"
    assert stored.record["scores"]["val_loss"] == pytest.approx(first.best)
    assert not list(tmp_path.glob("best-of-*"))


def test_a_score_that_is_not_a_number_is_never_the_best(one_block, task_files, tmp_path, caplog) -> None:
    caplog.set_level("INFO", "modular_experts")

    class Score(runs.Losses):
        def on_validation_end(self, trainer, pl_module) -> None:
            score = math.nan if trainer.global_step < nans else float(10 - trainer.global_step)
            trainer.callback_metrics["mine"] = torch.tensor(score)

    export = ExportExpert(str(tmp_path / "library"), "mine", monitor="mine", overwrite=True)
    nans = 2
    _rising(one_block, task_files, tmp_path, Score(), export, steps=3)
    assert (export.best, export.best_step) == (7.0, 3)
    nans = 9
    _rising(one_block, task_files, tmp_path, Score(), export, steps=2)
    assert export.best is None
    assert f"exported the last of 2 steps to {export.target}, as mine was never a number" in caplog.messages


def test_an_interrupted_run_leaves_its_best_state_until_the_expert_is_complete(
    one_block, task_files, tmp_path, caplog
) -> None:
    caplog.set_level("INFO", "modular_experts")
    place = one_block, task_files, tmp_path
    first = ExportExpert(str(tmp_path / "library"), "mine")
    for _ in range(2):
        with pytest.raises(SystemExit):
            _rising(*place, first, Interrupt())
    assert first.best_step == 4
    left = sorted(tmp_path.glob("best-of-mine-*/mine"))
    assert len(left) == 2, "a run that starts afresh does not touch what may be resumed"
    for best in left:
        assert f"the best state so far, of step 4, is an ordinary expert in {best}" in caplog.text
        open_expert(best).verify()
    kept = open_expert(left[0]).content_hash
    resumed = ExportExpert(str(tmp_path / "library"), "mine")
    _rising(*place, resumed, steps=6, ckpt=tmp_path / "saved" / "step=4.ckpt")
    assert resumed.best_step == 4
    assert open_expert(resumed.target).content_hash == kept
    assert not list(tmp_path.glob("best-of-*"))
