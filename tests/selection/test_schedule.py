"""Schedule: the module and the export ask every schedule, whatever its class, and any module can be exported."""

from functools import partial

import pytest
import torch
from lightning.pytorch import LightningModule
from testbed import runs

from modular_experts.deltas import Dense
from modular_experts.experts import SparseExpert
from modular_experts.injection import expert_layers
from modular_experts.library import open_expert
from modular_experts.selection.schedule import Schedule
from modular_experts.training.export_expert import ExportExpert

SPARSE = partial(SparseExpert, keep_ratio=0.1)


class Halve(Schedule):
    """Halves the number of kept entries before the optimizer is made."""

    def before_optimizers(self, trainer, module) -> bool:
        assert not trainer.optimizers
        for _, layer in expert_layers(module.model):
            layer.expert.resize(layer.matrix, torch.arange(layer.expert.kept_units // 2))
        return True

    def shares(self, module) -> dict[str, float]:
        return {"halved": 0.5}

    def costs(self, trainer, module) -> dict[str, float]:
        return {"halvings": len(list(expert_layers(module.model)))}


def test_a_schedule_of_ones_own_resizes_and_is_recorded_beside_the_mask_schedule(fitted, tiny_llama_dir, tmp_path):
    export = ExportExpert(str(tmp_path / "library"), "mine", monitor=None)
    module, trainer, _ = fitted(SPARSE, Halve(), export, max_steps=2)
    kept = sum(layer.expert.values.numel() for _, layer in expert_layers(module.model))
    record = open_expert(export.target).record
    assert kept == 51 + 76 + 51 + 76
    assert record["costs"]["optimizer_bytes"] == 8 * kept, "the optimizer was made for the halves"
    assert record["costs"]["halvings"] == 4
    assert record["costs"]["selections"] == 1, "the schedule that the module adds is asked too"
    assert record["hyperparameters"]["halved"] == 0.5
    assert record["hyperparameters"]["kept"] == kept / 5120

    trainer.save_checkpoint(tmp_path / "a.ckpt")
    fresh = runs.module(tiny_llama_dir, SPARSE)
    fresh.on_load_checkpoint(torch.load(tmp_path / "a.ckpt", weights_only=True))
    assert sum(layer.expert.values.numel() for _, layer in expert_layers(fresh.model)) == kept


def test_only_checkpoints_that_say_that_nothing_was_resized_must_have_the_sizes_of_the_settings(
    fitted, tiny_llama_dir, tmp_path
) -> None:
    _, trainer, _ = fitted(SPARSE, max_steps=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    other = runs.module(tiny_llama_dir, partial(SparseExpert, keep_ratio=0.2))
    with pytest.raises(ValueError, match="the checkpoint's experts are not those configured"):
        other.on_load_checkpoint(checkpoint)
    del checkpoint["resized"], checkpoint["experts"], checkpoint["applied"]  # as in the first version
    other = runs.module(tiny_llama_dir, partial(SparseExpert, keep_ratio=0.2))
    other.on_load_checkpoint(checkpoint)
    assert {layer.expert.kept_units for _, layer in expert_layers(other.model)} == {102, 153}


class Plain(LightningModule):
    """A module without a base model."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)

    def training_step(self, batch, batch_idx) -> torch.Tensor:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Exported(Plain):
    """The same with the facts that `ExportExpert` asks for."""

    def task_vector(self):
        yield "layer.weight", Dense(self.layer.weight.detach().clone())

    def record_facts(self) -> dict:
        return {"kind": "Mine", "base": {"fingerprint": "0" * 64}, "hyperparameters": {"a": 1}, "parents": []}


def test_any_module_with_a_task_vector_and_facts_is_exported_and_others_are_refused(tmp_path) -> None:
    rows, export = torch.ones(6, 4), ExportExpert(str(tmp_path / "library"), "mine")
    settings = {"max_steps": 3, "limit_val_batches": 0, "log_every_n_steps": 1}
    module = Exported()
    runs.trainer(tmp_path, export, **settings).fit(module, torch.utils.data.DataLoader(rows))
    stored = open_expert(export.target)
    assert torch.equal(stored["layer.weight"].dense(), module.layer.weight)
    assert (stored.record["kind"], stored.record["hyperparameters"]) == ("Mine", {"a": 1, "steps": 3})
    assert stored.record["costs"] == {"optimizer_bytes": 0}
    with pytest.raises(TypeError, match="cannot export Plain, which is no ExportedModule"):
        runs.trainer(tmp_path, export, **settings).fit(Plain(), torch.utils.data.DataLoader(rows))
