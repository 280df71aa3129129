"""The estimate of a fit equals what the fit then does, and neither changes nor writes anything."""

from typing import ClassVar

import pytest
import torch
from lightning.pytorch import seed_everything
from testbed.runs import mixture, module, trainer

from modular_experts.data import TaskMixture
from modular_experts.experts import FullExpert, LoRAExpert, MaskedExpert, SparseExpert
from modular_experts.masks import Reselect
from modular_experts.selection.mask_schedule import MaskSchedule
from modular_experts.training.estimate import measure_fit
from modular_experts.training.export_expert import ExportExpert
from modular_experts.training.log_progress import LogProgress


class Validations(LogProgress):
    """Counts how often the validation rows are measured."""

    count = 0

    def on_validation_end(self, trainer, pl_module):
        self.count += 1


class Rows(MaskSchedule):
    """Keeps how many rows the batches of all its copies have."""

    seen: ClassVar[list[int]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self.seen.append(len(batch["input_ids"]))


@pytest.mark.parametrize("processes", [1, 2])
def test_an_estimate_is_for_one_of_the_processes(processes, tiny_llama_dir, task_files, tmp_path):
    Rows.seen.clear()
    run = trainer(tmp_path, Rows(), devices=processes, strategy="ddp" if processes > 1 else "auto")
    data = mixture(task_files, tiny_llama_dir, packing=False)
    measure_fit(module(tiny_llama_dir, SparseExpert), data, run)
    assert set(Rows.seen) == {4 // processes}


@pytest.mark.parametrize("expert", [SparseExpert, FullExpert])
def test_estimates_before_and_between_fits_change_and_write_nothing(expert, tiny_llama_dir, task_files, tmp_path):
    found = []
    for first in (False, True):
        seed_everything(0, verbose=False)
        trained, run, data = module(tiny_llama_dir, expert), trainer(tmp_path), mixture(task_files, tiny_llama_dir)
        if first:
            measure_fit(trained, data, run)
        run.fit(trained, data)
        found.append({name: tensor.clone() for name, tensor in trained.state_dict().items()})
    assert found[0].keys() == found[1].keys()
    measure_fit(trained, data, trainer(tmp_path, max_steps=20))
    for after in (found[1], trained.state_dict()):
        assert all(torch.equal(tensor, after[name]) for name, tensor in found[0].items())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("expert", "schedule", "parts", "batches"),
    [
        (LoRAExpert, None, 1, 4),
        (SparseExpert, Reselect(every=2, until=1.0), 2, 4),
        (SparseExpert, Reselect(every=2, until=1.0), 2, "step"),
        # Their own rules choose at the steps 0, 1, 2 and 3, and before the last step of the first epoch.
        ({"q_proj": SparseExpert, "down_proj": MaskedExpert}, None, 1, "step"),
        ({"q_proj": MaskedExpert, "down_proj": SparseExpert}, None, 1, "step"),
    ],
)
def test_choices_validations_and_stored_bytes_are_those_of_the_fit(
    expert, schedule, parts, batches, tiny_llama_dir, task_files, tmp_path
):
    how = {"experts": expert, "modules": None} if isinstance(expert, dict) else {"expert": expert}
    trained, data = module(tiny_llama_dir, **({"expert": None} | how)), mixture(task_files, tiny_llama_dir)
    mask, validations = MaskSchedule(rule=schedule, batches=batches), Validations()
    export = ExportExpert(str(tmp_path), "made")
    run = trainer(tmp_path, mask, validations, export, max_steps=8, accumulate_grad_batches=parts)
    found = measure_fit(trained, data, run)
    assert (mask.selections, validations.count) == (0, 0)
    run.fit(trained, data)
    assert (found.choices, found.validations) == (mask.selections, validations.count)
    assert found.length == trained.length
    assert found.length.total_steps == 8
    assert all(seconds > 0 for name, seconds in found.seconds.items() if name != "choices" or found.choices)
    assert found.rates == [1e-3 if isinstance(expert, dict) else expert.learning_rate]
    if not isinstance(expert, dict):
        file = (tmp_path / "made" / "delta.safetensors").read_bytes()
        # The file begins with the length of its header, which names the tensors.
        tensors = len(file) - 8 - int.from_bytes(file[:8], "little")
        assert found.on_disk == pytest.approx(tensors, rel=0.02)


def test_rows_tokens_and_trained_numbers_are_counted(tiny_llama_dir, task_files, tmp_path):
    data = mixture(task_files, tiny_llama_dir, max_length=13)
    found = measure_fit(module(tiny_llama_dir, LoRAExpert), data, trainer(tmp_path))
    # Each character is a token: "upper ban:" and " BAN" and the end are 15, "reverse ban:" 17, "first ban:" " b" 13.
    assert [(one.task, one.role, one.split, one.rows, one.tokens, one.truncated) for one in found.splits] == [
        *[("upper", "held_in", split, rows, 13 * rows, rows) for split, rows in SPLITS.items()],
        *[("reverse", "held_in", split, rows, 13 * rows, rows) for split, rows in SPLITS.items()],
        ("first", "held_out", "test", 6, 13 * 6, 0),
    ]
    assert found.padding == 0
    # Rank 8 from 32 to 32 inputs, and from 48 to 32, in two blocks each.
    assert {one.name.split(".")[-2]: (one.weights, one.entries, one.trained) for one in found.weights} == {
        "q_proj": (2, 2 * 32 * 32, 2 * 8 * (32 + 32)),
        "down_proj": (2, 2 * 32 * 48, 2 * 8 * (32 + 48)),
    }
    trained = 4 * sum(one.trained for one in found.weights)
    assert found.bytes["trained numbers and gradients"] == 2 * trained
    assert found.bytes["optimizer state"] == 2 * trained
    assert sum(found.bytes.values()) == found.peak


SPLITS = {"train": 12, "validation": 6, "test": 6}


def test_padding_is_that_of_the_training_batches(tiny_llama_dir, tmp_path):
    file = tmp_path / "two.jsonl"
    rows = ['{"input": "a", "target": "b", "split": "train"}', '{"input": "aaaa", "target": "b", "split": "train"}']
    file.write_text("\n".join([*rows, '{"input": "c", "target": "d", "split": "validation"}']))
    # Rows of 4 and 7 tokens make a batch of 2 x 7, or one pack.
    for packing, share in ((False, 3 / 14), (None, 0)):
        data = TaskMixture([{"name": "two", "path": str(file)}], tokenizer=str(tiny_llama_dir), packing=packing)
        found = measure_fit(module(tiny_llama_dir, LoRAExpert), data, trainer(tmp_path))
        assert found.padding == pytest.approx(share)
