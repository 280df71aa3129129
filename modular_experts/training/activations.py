"""Turn gradient checkpointing on where a training would else take more memory than there is.

`predict` would answer the same question from shapes in seconds, and needs a base on disk. Every fit asks it, so here
three short rows, which pass two blocks of the loaded model, answer within a twentieth of a second.
"""

import itertools
import logging
import re
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.hooks import RemovableHandle
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
_STEP = 8
"""Tokens of the shortest row that is measured; the others have twice and three times as many."""


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
    """Return the bytes that blocks keep for the backward pass of a batch, extrapolated from three short rows."""
    trainer = module.trainer
    device = trainer.strategy.root_device
    draw_experts(module.model, "0/0")
    # The passes must not move the random state of the training.
    with torch.random.fork_rng([device] if device.type == "cuda" else []), trainer.precision_plugin.forward_context():
        short = [_KeptByBlocks(module.model, blocks).pass_of(batch, count * _STEP, device) for count in (1, 2, 3)]
    rows, length = batch["input_ids"].shape
    whole = _extrapolated([row.bytes for row in short], rows, length)
    inputs = _extrapolated([row.inputs for row in short], rows, length)
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


def _extrapolated(short: Sequence[int], rows: int, length: int) -> int:
    """Return the bytes of a batch from the bytes of three rows, of one, two and three times `_STEP` tokens.

    A row of t steps keeps `constant + linear * t + square * t^2` bytes; attention may keep the square.
    """
    square = (short[2] - 2 * short[1] + short[0]) / 2
    linear = short[1] - short[0] - 3 * square
    constant = short[0] - linear - square
    steps = length / _STEP
    # What does not grow, such as weights in the data type of autocast, is there once for all rows.
    return int(constant + rows * (linear * steps + square * steps**2))


class _KeptByBlocks:
    """Counts the bytes that blocks keep for backward, and of their inputs, in the forward pass of a short row.

    Where blocks have equal parameters, only the first two compute: experts may widen the output of the first, so the
    second counts for all others, which return its output.
    """

    def __init__(self, model: nn.Module, blocks: list[GradientCheckpointingLayer]) -> None:
        self.bytes = 0
        self.inputs = 0
        self._model = model
        self._alike: dict[object, list[GradientCheckpointingLayer]] = {}
        for block in blocks:
            parts = tuple((name, part.shape, part.requires_grad) for name, part in block.named_parameters())
            self._alike.setdefault((type(block), parts), []).append(block)
        # For how many blocks the one that computes now counts; 0 outside of blocks.
        self._counts_for = 0
        # Storages that are counted already, or belong to the model. They stay here, so that no other takes their place.
        own = itertools.chain(model.parameters(), model.buffers())
        self._seen: dict[int, torch.UntypedStorage | None] = {tensor.untyped_storage()._cdata: None for tensor in own}

    def pass_of(self, batch: Batch, tokens: int, device: torch.device) -> "_KeptByBlocks":
        """Pass a row of `tokens` copies of the batch's first token forward, with one label."""
        ids = batch["input_ids"][:1, :1].expand(1, tokens).to(device)
        labels = ids.new_full(ids.shape, IGNORED)
        labels[0, -1] = 0
        row = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "task": batch["task"][:1]}
        hooks = [hook for blocks in self._alike.values() for hook in self._hooked(blocks)]
        try:
            with saved_tensors_hooks(self._keep, lambda tensor: tensor):
                answer_logits(self._model, row)
        finally:
            for hook in hooks:
                hook.remove()
            for blocks in self._alike.values():
                for block in blocks[2:]:
                    del block.forward
        self._seen.clear()
        return self

    def _hooked(self, blocks: list[GradientCheckpointingLayer]) -> Iterator[RemovableHandle]:
        """Let the first two of some equal blocks count, and the others return the output of the second."""
        output: list[Any] = []

        def enter(block: nn.Module, _: object) -> None:
            self._counts_for = 1 if block is blocks[0] else len(blocks) - 1

        def leave(block: nn.Module, _: object, returned: Tensor | tuple[Tensor, ...]) -> None:
            # The output of a block is the input of the next.
            states = returned if isinstance(returned, Tensor) else returned[0]
            self.inputs += self._counts_for * states.nbytes
            self._counts_for = 0
            output[:] = [returned]

        for block in blocks[2:]:
            block.forward = lambda *_, **__: output[0]
        for block in blocks[:2]:
            yield block.register_forward_pre_hook(enter)
            yield block.register_forward_hook(leave)

    def _keep(self, tensor: Tensor) -> None:
        """Count a tensor that backward would read; nobody goes back, and a graph that kept it would hold itself."""
        if not self._counts_for or tensor.layout != torch.strided:  # sparse tensors are deltas
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen[storage._cdata] = storage
            self.bytes += self._counts_for * storage.nbytes()
