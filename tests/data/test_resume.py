"""A run that is resumed in the middle of an epoch sees exactly the rows that it would have seen."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tokenizer
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from modular_experts.data import Batch, Task, TaskMixture

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),  # Lightning 2.6.6 meets torch 2.13
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "max_epochs": 3,
}


class Recorder(LightningModule):
    """Records each batch that it is given, with the optimizer step it belongs to."""

    def __init__(self, ask_for_steps: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, int, list[list[int]]]] = []
        self.ask_for_steps = ask_for_steps

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.ask_for_steps:
            self.trainer.estimated_stepping_batches  # noqa: B018 - it makes Lightning build the loader too early
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.seen.append((self.global_step, batch_idx, batch["input_ids"].tolist()))
        return self.weight * batch["labels"].sum()

    def validation_step(self, batch: Batch) -> None:
        pass


def mixture(task_files: dict[str, Path], **options: Any) -> TaskMixture:
    """24 training rows: an epoch of six batches of four."""
    tasks = [Task(name, path=str(task_files[name])) for name in ("upper", "reverse")]
    return TaskMixture(tasks, build_tokenizer(), batch_size=4, **options)


def run(
    files: dict[str, Path], folder: Path, resume: Path | None = None, early: bool = False, **trainer: Any
) -> Recorder:
    module = Recorder(early)
    when = trainer.pop("saved", {"every_n_train_steps": 1})
    save = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **when)
    workers = trainer.pop("workers", 0)
    Trainer(**QUIET, **trainer, callbacks=[save]).fit(
        module, datamodule=mixture(files, num_workers=workers), ckpt_path=resume
    )
    return module


CASES = {
    "plain": {},
    "accumulated over the end": {"accumulate_grad_batches": 4},
    "limited": {"limit_train_batches": 5},
    "validated in mid-epoch": {"val_check_interval": 2},
    "saved after validation": {
        "val_check_interval": 2,
        "saved": {"every_n_epochs": 1, "save_on_train_epoch_end": False},
    },
    "saved after the epoch": {"saved": {"every_n_epochs": 1, "save_on_train_epoch_end": True}},
    "with steps asked for early": {"early": True},
}


@pytest.mark.parametrize("case", CASES)
def test_resumed_from_any_step_equals_uninterrupted(task_files: dict[str, Path], tmp_path: Path, case: str) -> None:
    whole = run(task_files, tmp_path / "whole", **CASES[case])
    steps = sorted(int(path.stem.removeprefix("step=")) for path in (tmp_path / "whole").iterdir())
    assert len(steps) >= 3
    # Every step of the plain run; elsewhere the first, the last, and one in each epoch.
    for step in steps if case == "plain" else {steps[0], steps[len(steps) // 3], steps[len(steps) // 2], steps[-1]}:
        rest = run(task_files, tmp_path / str(step), tmp_path / "whole" / f"step={step}.ckpt", **CASES[case])
        assert rest.seen == [entry for entry in whole.seen if entry[0] >= step], f"resumed at step {step}"


def test_resumed_with_workers_that_read_ahead(task_files: dict[str, Path], tmp_path: Path) -> None:
    whole = run(task_files, tmp_path / "whole")
    rest = run(task_files, tmp_path / "rest", tmp_path / "whole" / "step=9.ckpt", workers=1)
    assert rest.seen == whole.seen[9:]


def test_an_epoch_is_every_row_once(task_files: dict[str, Path], tmp_path: Path) -> None:
    seen = run(task_files, tmp_path).seen
    epochs = [[row for _, _, batch in seen[start : start + 6] for row in batch] for start in (0, 6, 12)]
    lengths = [sorted(len([token for token in row if token]) for row in epoch) for epoch in epochs]
    assert lengths[0] == lengths[1] == lengths[2]
    assert len({str(epoch) for epoch in epochs}) == 3


SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from test_resume import QUIET, Recorder, mixture
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from modular_experts.evaluation import TaskScores

out, resume, distributed_sampler = Path(sys.argv[2]), sys.argv[3] or None, sys.argv[4] == "1"
files = {name: Path(sys.argv[5]) / f"{name}.jsonl" for name in ("upper", "reverse")}
module, data = Recorder(), mixture(files, eval_batch_size=4)
tested, scores = [], TaskScores(data.roles)


def test_step(batch):
    tested.append(list(zip(batch["task"], batch["input"])))
    lengths = torch.tensor([len(text) for text in batch["target"]])
    scores.update(batch, 0.25 * lengths, lengths, generations=batch["target"])


module.test_step = test_step
trainer = Trainer(**QUIET, strategy="ddp", devices=2, use_distributed_sampler=distributed_sampler,
                  callbacks=[ModelCheckpoint(out, filename="{step}", every_n_train_steps=1, save_top_k=-1)])
trainer.fit(module, datamodule=data, ckpt_path=resume)
trainer.test(module, datamodule=data, verbose=False)
(out / f"rank{trainer.global_rank}.json").write_text(json.dumps([module.seen, tested, scores.compute()]))
torch.distributed.barrier()
torch.distributed.destroy_process_group()  # gloo's threads abort a process that ends without it, now and then
"""


def two_processes(folder: Path, out: Path, resume: str, distributed_sampler: bool) -> list[Any]:
    import json

    out.mkdir()
    script = out / "run.py"
    script.write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "RANK", "LOCAL_RANK"))
    }
    tests = Path(__file__).resolve().parent
    environment |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = f"{tests.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    command = [sys.executable, str(script), str(tests), str(out), resume, str(int(distributed_sampler)), str(folder)]
    process = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True)
    try:
        _, errors = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors[-3000:]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.ddp
def test_two_processes_share_each_batch_and_resume_in_the_middle(task_files: dict[str, Path], tmp_path: Path) -> None:
    alone = run(task_files, tmp_path / "alone")
    folder = task_files["upper"].parent
    ranks = two_processes(folder, tmp_path / "two", "", distributed_sampler=True)

    def rows(batch: list[list[int]]) -> list[list[int]]:
        return sorted([token for token in row if token] for row in batch)

    for number, (_, _, batch) in enumerate(alone.seen):
        first, second = (rank[0][number][2] for rank in ranks)
        assert len(first) == len(second) == 2
        assert rows(first + second) == rows(batch)

    resumed = two_processes(folder, tmp_path / "rest", str(tmp_path / "two" / "step=8.ckpt"), distributed_sampler=False)
    assert [rank[0] for rank in resumed] == [rank[0][8:] for rank in ranks]

    tested = [tuple(row) for rank in ranks for batch in rank[1] for row in batch if row[0]]
    assert len(tested) == len(set(tested)) == 12
    means = {"loss": 0.25, "exact_match": 1.0, "rougeL": 1.0}
    tasks = {name: {"role": "held_in", "rows": 6} | means for name in ("upper", "reverse")}
    assert ranks[0][2] == ranks[1][2] == {"tasks": tasks, "held_in": means, "held_out": {}}
