"""TrainUnderOthers trains an expert while other experts of a library are in the base, so that it merges better."""

import random
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from modular_experts.base.apply import moved_quantised
from modular_experts.base.structure import weight_of
from modular_experts.data.batch import source_of
from modular_experts.deltas import Delta, Dense, LowRank, add
from modular_experts.experts.expert import InPlaceExpert, trains_weight
from modular_experts.injection import ExpertLayer, expert_layers
from modular_experts.injection.sharded import is_sharded
from modular_experts.library import Library, StoredExpert, check_fingerprint, open_experts
from modular_experts.library.expert import RECORD_FILE
from modular_experts.selection.schedule import Schedule, TrainedModule, callbacks_of, seed_of


class TrainUnderOthers(Schedule):
    """Computes each step's loss at `W + d + scale * (d_1 + ... + d_count)`, with others drawn anew for each step.

    `W` is the base, also of the others, and `d` the expert that is trained. After the step the others are taken out
    again, bit for bit, so that validations, checkpoints and exports hold the expert alone. The draw depends on the seed
    and the step only: a resumed run repeats it, and all ranks share it.

    Args:
        others: Experts, or libraries of them. Experts of a task that is trained are left out, merges of it too. Their
            deltas are held in memory.
        count: How many are drawn for a step.
        scale: Factor of their deltas.
        seed: Seed of the draws; the run's own (`seed_everything`) if not given.
    """

    def __init__(self, others: list[str] | str, count: int = 3, scale: float = 0.3, seed: int | None = None) -> None:
        if count < 1:
            raise ValueError(f"count={count} must be at least 1")
        self.paths = [others] if isinstance(others, str) else list(others)
        self.count = count
        self.scale = scale
        self.seed = seed
        self.others: list[StoredExpert] = []
        self._deltas: list[Mapping[str, Delta]] = []
        self._before: dict[str, tuple[Tensor | None, Tensor]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open the experts, before anything is loaded; raise if fewer are left than a step draws."""
        if stage != "fit":
            return
        places: list[str | Path] = []
        for path in self.paths:
            directory = Path(path).expanduser()
            library = directory.is_dir() and not (directory / RECORD_FILE).is_file()
            places += [directory / name for name in Library(directory)] if library else [path]
        trained = {name for name, role in source_of(trainer).roles.items() if role == "held_in"}
        opened = [open_experts([path])[0] for path in dict.fromkeys(places)]
        self.others = [expert for expert in opened if not trained & set(expert.record["tasks"])]
        if len(self.others) < self.count:
            raise ValueError(
                f"count={self.count} others cannot be drawn from {len(self.others)} experts ({', '.join(self.paths)}, "
                f"without those of {', '.join(sorted(trained))}); give more experts, or a smaller count"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the others; raise if they are of another base, or would become a part of the expert's delta."""
        module = cast(TrainedModule, pl_module)
        for name, layer in expert_layers(module.model):
            if layer.expert.delta_of_base:
                raise ValueError(
                    f"TrainUnderOthers: the {type(layer.expert).__name__} at {name} makes its delta of weights of the "
                    "base, where the others would become a part of it; train it without this callback"
                )
            if trains_weight(layer.expert) and module.preferences:
                raise ValueError(
                    f"TrainUnderOthers: {name} is trained itself, so a loss of preferences would compare with a start "
                    "without the others; train a sparse or low-rank expert, or leave this callback or model.loss out"
                )
        if is_sharded(module.model):
            raise ValueError(
                "TrainUnderOthers writes others into weights, of which each process holds a part; train without this "
                "callback, or without shard_base"
            )
        if quantised := moved_quantised(module.model, self.others):
            raise ValueError(
                f"TrainUnderOthers: {quantised[0]} is quantised, and the others cannot be written into it; train "
                "without this callback, or on the base as plain floats"
            )
        check_fingerprint(self.others, module.fingerprint, module.base)
        self._deltas = [dict(expert) for expert in self.others]

    @torch.no_grad()
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        module = cast(TrainedModule, pl_module)
        model = module.model
        drawn = random.Random(f"{seed_of(self.seed, module)}/{trainer.global_step}").sample(self._deltas, self.count)
        layers = dict(expert_layers(model))
        for name in sorted({name for deltas in drawn for name in deltas}):
            delta = add([deltas[name] * self.scale for deltas in drawn if name in deltas])
            weight, inside = _weight(model, layers, name)
            delta = (layers[name].oriented(delta) if name in layers else delta).to(weight.device)
            if inside:
                inside.restore(weight, weight.detach)
            kept = None if isinstance(delta, Dense | LowRank) else delta.support().long()
            values = weight.clone() if kept is None else weight.reshape(-1)[kept]
            self._before[name] = (kept, values)
            delta.add_to(weight)
            if inside:
                inside.reanchor(weight)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Take the others out of weights that the optimizer itself is about to move, or their rounding would stay."""
        layers = expert_layers(cast(TrainedModule, pl_module).model)
        _remove(trainer, pl_module, {name for name, layer in layers if trains_weight(layer.expert)})

    @torch.no_grad()
    def remove(self, module: TrainedModule, only: Collection[str] | None = None) -> None:
        layers = dict(expert_layers(module.model))
        for name in [name for name in self._before if only is None or name in only]:
            kept, values = self._before.pop(name)
            weight, inside = _weight(module.model, layers, name)
            if inside:
                # Whatever entries the expert trains by now, the weight then holds the base and the others alone.
                inside.restore(weight, weight.detach)
            if kept is None:
                weight.copy_(values)
            else:
                weight.view(-1)[kept] = values
            if inside:
                inside.reanchor(weight)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: object) -> None:
        _remove(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._before:
            _remove(trainer, pl_module)

    def costs(self, trainer: Trainer, module: TrainedModule) -> dict[str, float]:
        return {"others": self.count, "others_scale": self.scale}


def _remove(trainer: Trainer, module: LightningModule, only: Collection[str] | None = None) -> None:
    # The last first, because each brings back the weights that it found.
    for callback in reversed(callbacks_of(trainer, TrainUnderOthers)):
        callback.remove(cast(TrainedModule, module), only)


def _weight(model: nn.Module, layers: Mapping[str, ExpertLayer], name: str) -> tuple[Tensor, InPlaceExpert | None]:
    """Return a weight as its expert sees it, with an expert that lies in it; or the parameter of another layer."""
    if name not in layers:
        return weight_of(model, name), None
    layer = layers[name]
    inside = layer.expert if isinstance(layer.expert, InPlaceExpert) else None
    return layer.matrix, inside
