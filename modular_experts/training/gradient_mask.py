"""GradientMask trains only chosen entries of any parameter: weight decay and optimizer state leave the others alone."""

from collections.abc import Mapping

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from modular_experts.library import open_expert
from modular_experts.text import did_you_mean


class GradientMask(Callback):
    """Keeps the entries outside the masks exactly as they were when training started.

    Args:
        masks: Boolean tensors by parameter name, in the parameter's shape, true where an entry may move; or the
            directory of a library expert, whose support is the mask of each of its weights.
    """

    def __init__(self, masks: Mapping[str, Tensor] | str) -> None:
        self.masks = masks
        self._read: Mapping[str, Tensor] = {}
        self._masked: dict[str, tuple[nn.Parameter, Tensor, Tensor]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the expert as it is when a fit begins, before anything is loaded."""
        if stage == "fit":
            self._read = _supports(self.masks) if isinstance(self.masks, str) else self.masks

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._masked = {}
        trained = {name: p for name, p in pl_module.named_parameters() if p.requires_grad}
        for name, mask in self._read.items():
            matching = [full for full in trained if full == name or full.endswith(f".{name}")]
            if len(matching) != 1:
                near = did_you_mean(name, trained, cutoff=0.4)
                raise ValueError(f"the mask {name!r} matches {len(matching)} trained parameters, not one{near}")
            parameter = trained[matching[0]]
            if parameter.shape != mask.shape:
                raise ValueError(
                    f"the mask of {name} has shape {tuple(mask.shape)}, the parameter {tuple(parameter.shape)}"
                )
            mask = mask.to(parameter.device, torch.bool)
            self._masked[name] = (parameter, mask, parameter.detach().clone())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        # Lightning clips gradients later.
        for parameter, mask, _ in self._masked.values():
            if parameter.grad is not None:
                parameter.grad.mul_(mask)
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == mask.shape:
                    value.mul_(mask)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: object) -> None:
        for parameter, mask, start in self._masked.values():
            parameter.copy_(torch.where(mask, parameter, start))


def _supports(expert: str) -> dict[str, Tensor]:
    masks = {}
    for name, delta in open_expert(expert).items():
        masks[name] = torch.zeros(delta.shape, dtype=torch.bool)
        masks[name].view(-1)[delta.support().long()] = True
    return masks
