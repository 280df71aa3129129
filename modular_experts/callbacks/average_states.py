"""AverageStates validates and exports the mean of a fit's last states instead of its last one.

Lightning's `WeightAveraging` does not fit experts: it copies the whole base, it averages the buffers in which sparse
experts keep their indices, and where a support has moved it adds values of different entries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from modular_experts.callbacks.schedule import ExportSchedule, TrainedModule
from modular_experts.injection import write_experts
from modular_experts.selection.scoring import selectable_layers


class AverageStates(ExportSchedule):
    """Averages the trained values after each of the last steps; validations and exports see the mean.

    Training itself goes on from its own values. Before the first averaged step, validations and exports see those. A
    choice of other entries (`MaskSchedule`) starts the mean anew, so it holds states of one support only. When training
    ends, the mean stays in the model. It takes as much memory as the trained values and the indices of their entries.

    It matters with a learning rate that stays high to the end (`Constant`): `WarmupLinear` and `WarmupCosine` make the
    last steps so small that their mean is nearly the last state (`docs/results/training-for-merging.md`).

    Args:
        share: The last share of all steps whose states are averaged, in (0, 1].
    """

    def __init__(self, share: float = 0.25) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"share={share} is outside (0, 1]; 0.25 averages the last quarter of all steps")
        self.share = share
        self._start_afresh()

    def _start_afresh(self) -> None:
        self.averaged = 0
        self._step = 0
        self._mean: dict[str, Tensor] = {}
        self._supports: dict[str, Tensor] = {}
        self._own: dict[str, Tensor] = {}  # the values of training, while the model holds the mean

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._start_afresh()

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        module, step = cast(TrainedModule, pl_module), trainer.global_step
        first = math.floor((1 - self.share) * module.length.total_steps) + 1
        if step == self._step or step < first:
            return
        self._step = step
        supports = {name: layer.expert.support_units() for name, layer in selectable_layers(module.model).items()}
        # A resumed run reads its mean and supports on the CPU.
        if not self.averaged or any(
            not torch.equal(units, self._supports[name].to(units.device)) for name, units in supports.items()
        ):
            self.averaged, self._mean = 0, {}
            self._supports = {name: units.clone() for name, units in supports.items()}
        self.averaged += 1
        for name, parameter in _trained(pl_module).items():
            mean = self._mean.get(name, torch.zeros_like(parameter)).to(parameter.device)
            self._mean[name] = mean.lerp_(parameter, 1 / self.averaged)

    @contextmanager
    def exported(self, module: TrainedModule) -> Iterator[None]:
        inside = bool(self._own)
        self._show(module)
        try:
            yield
        finally:
            if not inside:
                self._hide(module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._show(cast(TrainedModule, pl_module))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._hide(cast(TrainedModule, pl_module))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the model its own values back, which a checkpoint of the exception must hold."""
        self._hide(cast(TrainedModule, pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.interrupted:
            self._show(cast(TrainedModule, pl_module))
            self._own = {}

    def shares(self, module: TrainedModule) -> dict[str, float]:
        return {"averaged": self.averaged / module.length.total_steps}

    def state_dict(self) -> dict[str, Any]:
        return {"averaged": self.averaged, "step": self._step, "mean": self._mean, "supports": self._supports}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.averaged, self._step = state_dict["averaged"], state_dict["step"]
        self._mean, self._supports = dict(state_dict["mean"]), dict(state_dict["supports"])

    def _show(self, module: TrainedModule) -> None:
        if self.averaged and not self._own:
            trained = _trained(cast(nn.Module, module))
            self._own = {name: parameter.detach().clone() for name, parameter in trained.items()}
            _put(module, self._mean)

    def _hide(self, module: TrainedModule) -> None:
        if self._own:
            _put(module, self._own)
            self._own = {}


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def _put(module: TrainedModule, values: Mapping[str, Tensor]) -> None:
    for name, parameter in _trained(cast(nn.Module, module)).items():
        parameter.copy_(values[name])
    write_experts(module.model)
