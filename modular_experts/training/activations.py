"""Turn gradient checkpointing on where a training would else take more memory than there is.

Every fit asks this, and has its model loaded: a forward pass over its longest batch counts what blocks would keep for
the backward pass, and keeps nothing. Where no model is loaded, `predict` asks shapes.
"""

import itertools
import logging
import re
import resource
import sys
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from modular_experts.base.device import free_memory
from modular_experts.data.batch import IGNORED, MOST_BATCHES, Batch, DataSource, datamodule_of, size_of
from modular_experts.evaluation.likelihood import HEAD_BYTES, answer_logits
from modular_experts.injection import draw_experts
from modular_experts.selection.exchange import optimizer_bytes
from modular_experts.text import bytes_text

log = logging.getLogger(__name__)

_GAPS = 1.1
"""Tensors were seen to take up to this many times their bytes (`docs/guides/memory.md`)."""


class FittedModule(Protocol):
    """The parts of an `ExpertModule` that say what its fit keeps in memory."""

    model: PreTrainedModel
    gradient_checkpointing: bool | None
    shard_base: bool
    memory_limit: int | None
    preferences: object | None

    @property
    def trainer(self) -> Trainer: ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of the model and its experts."""


def recompute(model: PreTrainedModel, offload: bool = False) -> None:
    """Let blocks keep their inputs alone, with `offload` in the memory of the CPU, and compute again in backward."""
    model.activation_checkpointing_enable({"use_reentrant": False}, offload=offload)


def recompute_if_needed(module: FittedModule) -> None:
    """Turn gradient checkpointing on if the fit needs more memory than is free and checkpointing would reduce it.

    A user's own setting of `gradient_checkpointing` stays. Losses of preferences and sharded bases stay as they are.
    """
    data = datamodule_of(module.trainer)
    blocks = [part for part in module.model.modules() if isinstance(part, GradientCheckpointingLayer)]
    if module.gradient_checkpointing is not None or module.preferences or module.shard_base or not blocks:
        return
    # An earlier fit of this module may have turned it on.
    if not isinstance(data, DataSource) or any(block.gradient_checkpointing for block in blocks):
        return
    longest = max(itertools.islice(data.train_dataloader(), MOST_BATCHES), key=size_of)
    kept = activations(module, blocks, longest)
    other = _other(module, longest)
    device = module.trainer.strategy.root_device
    used = held_bytes(device)
    limit = module.memory_limit or used + free_bytes(device, module.trainer.num_devices)
    weights = sum(parameter.nbytes for parameter in module.parameters())
    if used < weights:
        # Weights are read from mapped files, whose pages count as free until they are touched.
        used += weights
    whole = used + _GAPS * (other + kept.whole)
    recomputed = used + _GAPS * (other + kept.recomputed)
    if whole <= limit:
        return
    sizes = [bytes_text(size) for size in (whole, limit, recomputed)]
    if recomputed > limit:
        log.warning(
            "this fit takes about %s and %s are there, also with gradient checkpointing, with which it takes %s; a dry "
            "run with `fit_into=%s` names options that help",
            *(*sizes, sizes[1].replace(" ", "")),
        )
        return
    recompute(module.model)
    log.info(
        "this fit takes about %s and %s are there, so it uses gradient checkpointing, with which it takes %s "
        "(`model.gradient_checkpointing=False` leaves that out)",
        *sizes,
    )


class Activations(NamedTuple):
    """The bytes that blocks keep for the backward pass of a batch."""

    whole: int
    """All that they compute."""
    recomputed: int
    """Their inputs, and all of one block, which gradient checkpointing computes again."""


def activations(module: FittedModule, blocks: list[GradientCheckpointingLayer], batch: Batch) -> Activations:
    """Return the bytes that blocks keep for the backward pass of a batch, counted in a forward pass that keeps none."""
    whole = 0
    inputs = 0
    is_in_block = False
    own = itertools.chain(module.model.parameters(), module.model.buffers())
    # The storages that are counted already, or belong to the model.
    seen = {tensor.untyped_storage()._cdata for tensor in own}

    def enter(block: nn.Module, _: object) -> None:
        nonlocal is_in_block
        is_in_block = True

    def leave(block: nn.Module, _: object, output: Tensor | tuple[Tensor, ...]) -> None:
        nonlocal is_in_block, inputs
        is_in_block = False
        # The output of a block is the input of the next.
        states = output if isinstance(output, Tensor) else output[0]
        inputs += states.nbytes

    def count(tensor: Tensor) -> None:
        nonlocal whole
        # Sparse tensors are deltas, which are there already.
        if not is_in_block or tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            whole += storage.nbytes()
            seen.add(storage._cdata)
            # Another storage may take the place of one that is freed.
            weakref.finalize(storage, seen.discard, storage._cdata)

    trainer = module.trainer
    device = trainer.strategy.root_device
    draw_experts(module.model, "0/0")
    hooks = [block.register_forward_pre_hook(enter) for block in blocks]
    hooks += [block.register_forward_hook(leave) for block in blocks]
    # The pass must not move the random state of the training.
    random_state = torch.random.fork_rng([device] if device.type == "cuda" else [])
    try:
        with random_state, trainer.precision_plugin.forward_context(), saved_tensors_hooks(count, lambda kept: kept):
            answer_logits(module.model, move_data_to_device(batch, device))
    finally:
        for hook in hooks:
            hook.remove()
    return Activations(whole, inputs + whole // len(blocks))


def _other(module: FittedModule, batch: Batch) -> int:
    """Return the bytes that a step adds beside the blocks: gradients, missing moments, and logits."""
    trained = sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)
    # Adam keeps two moments of each trained number; an optimizer that has stepped holds them already.
    moments = max(2 * trained - optimizer_bytes(module.trainer.optimizers), 0)
    labelled = int((batch["labels"] != IGNORED).sum())
    logits = 4 * labelled * module.model.config.get_text_config().vocab_size
    # The logits, their softmax and their gradient; the loss takes more logits than HEAD_BYTES in parts.
    return trained + moments + 3 * min(logits, HEAD_BYTES)


def high_water(device: torch.device) -> int:
    """Return the most memory that this process has had so far on a device, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):  # on Linux getrusage also counts the process that started this one
        kilobytes = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
        if kilobytes is not None:
            return 1024 * int(kilobytes[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def held_bytes(device: torch.device) -> int:
    """Return the bytes that this process has on a device, on Linux without pages of files."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    with suppress(OSError):  # only Linux has the file
        _, pages, of_files, *_ = map(int, Path("/proc/self/statm").read_text().split())
        return (pages - of_files) * resource.getpagesize()
    return high_water(device)


def free_bytes(device: torch.device, processes: int = 1) -> int:
    """Return the bytes that a process can take beside its own; several processes share the memory of a CPU."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return free_memory() // processes
