"""A schedule that lets experts rest in some steps."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from modular_experts.selection.schedule import Schedule, TrainedModule


class Pauses(Schedule):
    """Takes the gradients away in every second optimizer step.

    Args:
        first: The first step that rests.
    """

    def __init__(self, first: int = 1) -> None:
        self.first, self.steps, self.rests = first, 0, 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.steps = self.rests = 0

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if self.steps >= self.first and (self.steps - self.first) % 2 == 0:
            self.rests += 1
            for parameter in pl_module.parameters():
                parameter.grad = None
        self.steps += 1

    def costs(self, trainer: Trainer, module: TrainedModule) -> dict[str, float]:
        return {"rests": self.rests}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "rests": self.rests}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps, self.rests = state_dict["steps"], state_dict["rests"]
