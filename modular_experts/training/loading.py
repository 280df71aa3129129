"""Load the base that a module trains: its files or a model in memory, and the experts that are added to it first."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ParallelStrategy
from torch import nn

from modular_experts.base import Base
from modular_experts.base.apply import apply_deltas, moved_quantised
from modular_experts.base.quantised import Quantise
from modular_experts.experts.expert import Expert, trains_weight
from modular_experts.injection import named_experts
from modular_experts.injection.attach import attached
from modular_experts.injection.routed import Routed
from modular_experts.injection.save import place_of_model
from modular_experts.injection.sharded import reshard
from modular_experts.injection.task_heads import TaskHeads, put_task_heads
from modular_experts.library import StoredExpert, open_experts
from modular_experts.library.compatibility import check_mergeable

log = logging.getLogger(__name__)


def place_of(base: str | Path | Base | nn.Module, revision: str | None) -> tuple[str, str | None]:
    """Return the directory or hub id of a base or a loaded model, and its revision."""
    if isinstance(base, nn.Module):
        place, commit = place_of_model(base)
        return place, revision or commit
    if isinstance(base, Base):
        return base.place, revision or base.revision
    return str(base), revision


def trainer_of(module: LightningModule) -> Trainer | None:
    """Return the trainer that runs a module; None without one, as in `load_from_checkpoint`."""
    try:
        return module.trainer
    except RuntimeError:
        return None


def opened_base(place: str, applied: Sequence[StoredExpert], revision: str | None, quantise: Quantise | None) -> Base:
    """Open a base, which a loaded model may not name."""
    if not place:
        raise ValueError(
            "the model does not name its directory (config._name_or_path), whose files deltas start from; load it "
            "with from_pretrained, or give the directory as base"
        )
    return Base.open(place, applied, revision, quantise)


def check_given(model: nn.Module, base: Base, trains: bool) -> None:
    """Raise if a model in memory holds experts, or is not its base."""
    there = sum(not isinstance(expert, TaskHeads) for _, expert in named_experts(model))
    if trains and there:
        raise ValueError(
            f"the model holds {there} experts already; fit their module again to train them further, or take "
            "them out with modular_experts.eject(model)"
        )
    base.check_loaded(model)


def open_applied(names: Sequence[str], trains: bool) -> list[StoredExpert]:
    """Open the experts that are added to a base; a training on top of them takes deltas and routed experts only."""
    applied = open_experts(names, mergeable=False) if names else []
    check_mergeable([expert for expert in applied if trains and not expert.is_routed])
    return applied


def put_applied(model: nn.Module, applied: Sequence[StoredExpert], trains: bool) -> None:
    """Add stored experts to a model and freeze all of it; a training finds its layers free for new experts."""
    if all(expert.mergeable for expert in applied) and not moved_quantised(model, applied):
        apply_deltas(model, applied)
        put_task_heads(model, applied)
    else:
        put = attached(model, applied, check=False)
        if trains and isinstance(put, Routed):
            put.put_beneath()
    model.requires_grad_(False)


def hold_values(model: nn.Module, dtype: torch.dtype) -> None:
    """Hold what experts train in another data type than float32; raise if one trains the weight itself."""
    if dtype == torch.float32:
        return
    for name, expert in named_experts(model):
        if isinstance(expert, Expert) and trains_weight(expert):
            raise ValueError(
                f"values={str(dtype).removeprefix('torch.')} is for experts beside a weight, and the one of {name} "
                "trains the weight itself; leave values out, or take a sparse or low-rank expert"
            )
        for parameter in expert.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)


def check_strategy(trainer: Trainer) -> None:
    """Raise for a strategy that parts or moves what experts train, or adds up no gradients."""
    strategy = trainer.strategy
    if isinstance(strategy, ParallelStrategy) and (
        not isinstance(strategy, DDPStrategy) or isinstance(strategy, DeepSpeedStrategy)
    ):
        raise ValueError(
            f"{type(strategy).__name__} is not supported: experts stay whole in each process, and DDP adds up their "
            "gradients; take trainer.strategy=ddp, and model.shard_base for a base that one device cannot hold"
        )


def prepare_sharding(trainer: Trainer | None) -> None:
    """Let a trainer evaluate so that it can train after it; raise if its processes cannot share a base."""
    if trainer is None or trainer.world_size == 1:
        raise ValueError("shard_base needs several processes, such as `trainer.devices=2`; leave it out for one")
    for loop in (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
        loop.inference_mode = False  # FSDP2 could not write into weights that it gathered there


class Reshard(Callback):
    """Lets an error in a pass over a sharded base come out, before which Lightning moves the model to the CPU."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if hasattr(pl_module, "model"):
            reshard(cast(nn.Module, pl_module.model))


def check_on_top(model: nn.Module, applied: Sequence[StoredExpert]) -> None:
    """Raise if experts that choose by the input were put on top of a routed expert."""
    routed = [expert for expert in applied if expert.is_routed]
    chooses = [type(expert).__name__ for _, expert in named_experts(model) if not expert.mergeable]
    if routed and chooses:
        raise ValueError(
            f"{chooses[0]} chooses by the input, as {routed[0].name} does, and the two could not be used together; "
            "train an expert that is a delta, such as LoRAExpert"
        )


def check_precision(trainer: Trainer) -> None:
    """Raise if the trainer's precision would round what is trained."""
    layer = nn.utils.skip_init(nn.Linear, 1, 1, dtype=torch.float32)  # draws no random numbers
    (weight, _) = trainer.precision_plugin.convert_module(nn.Sequential(layer)).parameters()
    if weight.dtype.itemsize < torch.float32.itemsize:
        raise ValueError(
            f"trainer.precision={trainer.precision} also rounds the trained values, which must stay float32; for a "
            "base in half the memory give `dtype='bfloat16'` `trainer.precision='bf16-mixed'`"
        )


def warn_of_slow_bfloat16(trainer: Trainer | None, dtype: str) -> None:
    """Log which settings are slow on a processor without instructions for bfloat16."""
    if trainer is None or trainer.strategy.root_device.type != "cpu":
        return
    arguments = []
    if dtype == "bfloat16":
        arguments.append("`dtype='float32'`")
    if str(trainer.precision).startswith("bf16"):
        arguments.append("`trainer.precision='32-true'`")
    can = torch.cpu.get_capabilities()
    # On x86 and on ARM; a processor of another kind is not known to be slow.
    instructions = {"x86_64": ["avx512_bf16", "amx_bf16", "avx10_2"], "arm64": ["bf16"], "aarch64": ["bf16"]}
    known = instructions.get(str(can.get("architecture")), [])
    if arguments and known and not any(can.get(name) for name in known):
        avoid = f"{' and '.join(arguments)} avoids that"
        log.warning("this processor has no instructions for bfloat16, which took seven times as long; %s", avoid)
