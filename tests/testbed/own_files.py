"""Classes of a user's own that read a number in a file which their settings name, of every kind that settings hold."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from modular_experts.data.epoch import Mixing
from modular_experts.data.sources import TaskSource
from modular_experts.deltas import Delta, add
from modular_experts.experts import LoRAExpert
from modular_experts.masks import Score, SelectOnce
from modular_experts.methods import MergeMethod
from modular_experts.routing import Constant
from modular_experts.training.learning_rate import LearningRateShape
from modular_experts.training.preferences import PreferenceLoss


def number_in(file: str) -> float:
    return float(Path(file).read_text())


class Rows(TaskSource):
    """Sums with the number in a file."""

    def __init__(self, file: str) -> None:
        self.number = int(number_in(file))

    def rows(self) -> Iterator[dict[str, Any]]:
        for row, split in enumerate(["train", "train", "validation", "test"]):
            yield {"input": f"{row} + {self.number} =", "target": str(row + self.number), "split": split}


@dataclass(frozen=True)
class ScaledSum(MergeMethod):
    """The sum of the deltas times the number in a file."""

    file: str = ""

    def merge(self, deltas: Sequence[Delta], context: Any = None) -> Delta:
        return add(list(deltas)) * number_in(self.file)


class ScaledGradients(Callback):
    """Multiplies gradients by the number in a file, less 2.5: an optimizer such as AdamW sees signs alone."""

    def __init__(self, file: str) -> None:
        self.number = number_in(file) - 2.5

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                parameter.grad *= self.number


class StartedLoRA(LoRAExpert):
    """A LoRA whose products start at the number in a file."""

    def __init__(self, weight: Tensor, file: str = "") -> None:
        super().__init__(weight, rank=2)
        self.file = file
        torch.nn.init.constant_(self.down, number_in(file) / 100)


class DrawnScale(Callback):
    """Draws, when it is made, the number by which it multiplies gradients."""

    def __init__(self) -> None:
        self.number = torch.rand(()).item() - 0.5

    on_before_optimizer_step = ScaledGradients.on_before_optimizer_step


class OwnSGD(torch.optim.SGD):
    def __init__(self, params: Any, file: str = "") -> None:
        super().__init__(params, lr=number_in(file))


class OwnShape(LearningRateShape):
    def __init__(self, file: str = "") -> None:
        self.number = number_in(file)

    def factor(self, step: int, total_steps: int) -> float:
        return self.number


@dataclass(frozen=True)
class OwnLoss(PreferenceLoss):
    file: str = ""

    def of(self, margins: Tensor) -> Tensor:
        return -number_in(self.file) * margins


@dataclass(frozen=True)
class OwnScore(Score):
    """Ranks the entries of some rows first."""

    file: str = ""

    def __call__(self, weight: Tensor, gradient: Tensor, delta: Delta) -> Tensor:
        return torch.arange(float(weight.numel())).view(weight.shape).roll(int(number_in(self.file)), 0)


@dataclass(frozen=True)
class OwnRule(SelectOnce):
    file: str = ""


@dataclass(frozen=True)
class OwnMixing(Mixing):
    file: str = ""

    def share(self, size: int) -> float:
        return size ** number_in(self.file)


class OwnConstant(Constant):
    def __init__(self, file: str = "") -> None:
        super().__init__([number_in(file), 1.0])
        self.file = file
