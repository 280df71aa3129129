"""GradientMask: what it leaves out does not move, whatever the optimizer does."""

from functools import partial

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from testbed import runs

from modular_experts.base import Base
from modular_experts.experts import FullExpert, SparseExpert
from modular_experts.injection import expert_layers
from modular_experts.training.export_expert import ExportExpert
from modular_experts.training.gradient_mask import GradientMask

NAME = "model.layers.0.self_attn.q_proj.weight"


def _fit(base, files, folder, *callbacks, expert=FullExpert) -> object:
    own = {"optimizer": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.5)}
    how = {"gradient_clip_val": 1.0, "limit_val_batches": 0}
    return runs.fit(base, files, folder, expert, *callbacks, own=own, **how)[0]


@pytest.fixture
def mask() -> torch.Tensor:
    return torch.rand(32, 32, generator=torch.Generator().manual_seed(0)) < 0.2


def test_entries_outside_the_mask_stay_bit_for_bit(tiny_llama_dir, task_files, tmp_path, mask) -> None:
    module = _fit(tiny_llama_dir, task_files, tmp_path, GradientMask({NAME: mask}))
    base = Base.open(tiny_llama_dir)
    moved = module.model.get_parameter(NAME) != base.weight(NAME)
    assert torch.equal(moved, mask)
    state = module.trainer.optimizers[0].state[module.model.get_parameter(NAME)]
    assert not state["exp_avg_sq"][~mask].any()
    assert state["exp_avg_sq"][mask].all()
    other = "model.layers.1.self_attn.q_proj.weight"
    assert (module.model.get_parameter(other) != base.weight(other)).all()


def test_optimizer_state_from_before_the_mask_is_cleared(mask) -> None:
    module = LightningModule()
    module.weight = torch.nn.Parameter(torch.ones(32, 32))
    optimizer = torch.optim.AdamW(module.parameters())
    module.weight.grad = torch.ones(32, 32)
    optimizer.step()
    callback = GradientMask({"weight": mask})
    trainer = Trainer(barebones=True)
    callback.setup(trainer, module, "fit")
    callback.on_fit_start(trainer, module)
    callback.on_before_optimizer_step(trainer, module, optimizer)
    for moment in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(optimizer.state[module.weight][moment] != 0, mask)


def test_the_support_of_a_library_expert_is_a_mask(tiny_llama_dir, task_files, tmp_path) -> None:
    export = ExportExpert(str(tmp_path / "library"), "sparse", monitor=None)
    sparse = _fit(tiny_llama_dir, task_files, tmp_path, export, expert=partial(SparseExpert, keep_ratio=0.1))
    module = _fit(tiny_llama_dir, task_files, tmp_path, GradientMask(str(export.target)))
    base = Base.open(tiny_llama_dir)
    for name, layer in expert_layers(sparse.model):
        moved = (module.model.get_parameter(name) != base.weight(name)).view(-1)
        assert moved.nonzero().view(-1).tolist() == layer.expert.indices.tolist()
