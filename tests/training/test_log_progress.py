"""LogProgress says in lines how a fit goes and what came of it."""

import csv
import re
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from testbed import runs

from modular_experts.experts import LoRAExpert, SparseExpert
from modular_experts.masks import Reselect
from modular_experts.selection.mask_schedule import MaskSchedule
from modular_experts.training.export_expert import ExportExpert
from modular_experts.training.log_progress import LogProgress

SPARSE = partial(SparseExpert, keep_ratio=0.1)


@pytest.fixture
def lines(caplog):
    """What is logged, without the names of loggers."""
    caplog.set_level("INFO", "modular_experts")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("modular_experts")]


def test_a_line_at_every_tenth_has_the_mean_loss_the_new_validation_loss_and_the_time_left(
    tiny_llama_dir, task_files, tmp_path, lines
) -> None:
    """Batches of four of 24 rows and 12 of validation: 40 steps are validated ten times."""
    _, _, losses = runs.fit(tiny_llama_dir, task_files, tmp_path, SPARSE, max_steps=40)
    found = [line for line in lines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in found] == [f"step {step}/40" for step in range(4, 41, 4)]
    shape = r"step \d+/40: loss ([\d.]+), validation loss [\d.]+, \d+:\d\d:\d\d left"
    means = [float(re.fullmatch(shape, line)[1]) for line in found]
    wanted = torch.tensor(losses).view(10, 4).mean(dim=1).tolist()
    assert means == pytest.approx(wanted, rel=1e-3)


def test_accumulated_batches_count_in_full_and_a_line_comes_without_validation_too(fitted, lines) -> None:
    fitted(partial(LoRAExpert, rank=2), max_steps=2, accumulate_grad_batches=3)
    loss = next(re.search(r"loss ([\d.]+), 0:00:0\d left", line) for line in lines() if line.startswith("step 1/2"))
    assert 3 < float(loss[1]) < 6, "the loss of an untrained model of a hundred characters"
    assert any(line.startswith("trained on 24 rows in ") and "validation" not in line for line in lines())


def test_the_end_tells_losses_rows_seconds_and_places(tiny_llama_dir, task_files, tmp_path, lines) -> None:
    export = ExportExpert(str(tmp_path / "library"), "mine")
    logger, schedule = CSVLogger(tmp_path / "logs"), MaskSchedule(rule=Reselect(every=2, until=0.5))
    _, trainer, _ = runs.fit(
        tiny_llama_dir, task_files, tmp_path, SPARSE, export, schedule, logger=logger, log_every_n_steps=1
    )
    said = "\n".join(lines())
    (progress,) = [one for one in trainer.callbacks if isinstance(one, LogProgress)]
    seconds = progress.seconds
    assert seconds > 0
    assert progress.seconds == seconds, "the clock stands when training is over"
    first, last = f"{progress.first_loss:.4g}", f"{export.best:.4g}"
    assert f"the validation loss before training is {first}" in said
    assert re.search(
        rf"trained on 24 rows in [\d.]+ s, [\d.]+ s of which chose supports; .* from {first} to {last}", said
    )
    assert f"the expert is in {export.target}, metrics.csv is in {logger.log_dir}" in said
    assert "chose what is trained in 4 weights at step 3 in " in said
    rows = list(csv.DictReader((tmp_path / "logs/lightning_logs/version_0/metrics.csv").read_text().splitlines()))
    before = [float(row["val_loss"]) for row in rows if row["step"] == "0" and row["val_loss"]]
    assert before == [pytest.approx(progress.first_loss)]


def test_the_bar_of_lightning_counts_epochs_without_a_last_one_where_steps_bound_the_fit(fitted) -> None:
    seen, bar = set(), RichProgressBar()

    class Look(Callback):
        def on_train_batch_end(self, *_) -> None:
            seen.update(task.description.strip() for task in bar.progress.tasks)

    fitted(partial(LoRAExpert, rank=2), bar, Look(), max_steps=7, enable_progress_bar=True)
    assert seen == {"Epoch 0", "Epoch 1"}
