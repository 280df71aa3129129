"""Turn gradient checkpointing on where a training would else take more memory than there is."""

import itertools
import logging
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.hooks import RemovableHandle
from transformers.modeling_layers import GradientCheckpointingLayer

from modular_experts.base.device import free_memory
from modular_experts.data.batch import IGNORED, MOST_BATCHES, Batch, DataSource, datamodule_of, size_of
from modular_experts.evaluation.likelihood import HEAD_BYTES, answer_logits
from modular_experts.injection import draw
from modular_experts.selection.exchange import optimizer_bytes
from modular_experts.text import bytes_text

log = logging.getLogger(__name__)

_GAPS = 1.1
"""Tensors were seen to take up to so many times their bytes (`docs/guides/memory.md`)."""
_STEP = 8
"""The short rows that are measured have this many tokens, twice, and three times as many."""


def recompute(model: Any, offload: bool = False) -> None:
    """Let blocks keep their inputs alone, with `offload` in the memory of the CPU, and compute again in backward."""
    model.activation_checkpointing_enable({"use_reentrant": False}, offload=offload)


def recompute_if_needed(module: Any) -> None:
    """Turn gradient checkpointing on if the fit takes more memory than there is, and less with it, unless it is set.

    Short rows that pass forward tell what blocks keep of a token, so no base is loaded for it and no step is taken.
    Losses of preferences and sharded bases stay as they are.
    """
    data = datamodule_of(module.trainer)
    blocks = [one for one in module.model.modules() if isinstance(one, GradientCheckpointingLayer)]
    if module.gradient_checkpointing is not None or module.preferences or module.shard_base or not blocks:
        return
    # An earlier fit of this module may have turned it on.
    if not isinstance(data, DataSource) or any(one.gradient_checkpointing for one in blocks):
        return
    longest = max(itertools.islice(data.train_dataloader(), MOST_BATCHES), key=size_of)
    device = module.trainer.strategy.root_device
    kept, other = activations(module, blocks, longest), _other(module, longest)
    used, weights = held_bytes(device), sum(one.nbytes for one in module.parameters())
    there = module.memory_limit or used + free_bytes(device, module.trainer.num_devices)
    used += weights if used < weights else 0  # which are read from mapped files, whose pages count as free
    whole, less = (used + _GAPS * (other + some) for some in kept)
    if whole <= there:
        return
    numbers = [bytes_text(size) for size in (whole, there, less)]
    if less > there:
        limit = numbers[1].replace(" ", "")
        text = "this fit takes about %s and %s are there, also with gradient checkpointing, with which it takes %s; "
        log.warning(text + "`fit --dry-run --fit-into %s` names options that help", *numbers, limit)
        return
    recompute(module.model)
    text = "this fit takes about %s and %s are there, so it uses gradient checkpointing, with which it takes %s "
    log.info(text + "(--model.gradient_checkpointing false leaves that out)", *numbers)


def activations(module: Any, blocks: list[GradientCheckpointingLayer], batch: Batch) -> tuple[int, int]:
    """Return the bytes that blocks keep for the backward pass of a batch, and those with gradient checkpointing."""
    trainer, device = module.trainer, module.trainer.strategy.root_device
    draw(module.model, "0/0")
    with torch.random.fork_rng([device] if device.type == "cuda" else []), trainer.precision_plugin.forward_context():
        short = [_KeptByBlocks(module.model, blocks).pass_of(batch, count * _STEP, device) for count in (1, 2, 3)]
    kept, inputs = (
        _extrapolated([getattr(one, name) for one in short], *batch["input_ids"].shape) for name in ("bytes", "inputs")
    )
    return kept, inputs + kept // len(blocks)


def _other(module: Any, batch: Batch) -> int:
    """Return the bytes of gradients, of two moments of each trained number, and of the logits and their gradients."""
    trained = sum(one.nbytes for one in module.parameters() if one.requires_grad)
    logits = 4 * int((batch["labels"] != IGNORED).sum()) * module.model.config.get_text_config().vocab_size
    return trained + max(2 * trained - optimizer_bytes(module.trainer.optimizers), 0) + 3 * min(logits, HEAD_BYTES)


def high_water(device: torch.device) -> int:
    """Return the most memory that this process has had so far on a device, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):  # on Linux getrusage also counts the process that started this one
        if found := re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text()):
            return 1024 * int(found[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


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


def _extrapolated(found: list[int], rows: int, length: int) -> int:
    """Return the bytes of a batch, from rows of one, two and three times `_STEP` tokens."""
    steps, square = length / _STEP, (found[2] - 2 * found[1] + found[0]) / 2  # which attention may keep
    slope = found[1] - found[0] - 3 * square
    # What does not grow, such as weights in the data type of autocast, is there once.
    return int(found[0] - slope - square + rows * (slope * steps + square * steps**2))


class _KeptByBlocks:
    """Counts what blocks keep for backward, and the bytes of their inputs, in the forward pass of a short row.

    Where blocks have equal parameters, the first two compute, as experts may widen the output of the first; the second
    counts for the others, which return its output.
    """

    def __init__(self, model: nn.Module, blocks: list[GradientCheckpointingLayer]) -> None:
        self.bytes = self.inputs = self._alike = 0
        self._model, self._kinds = model, dict[Any, list[GradientCheckpointingLayer]]()
        for block in blocks:
            parts = tuple((name, one.shape, one.requires_grad) for name, one in block.named_parameters())
            self._kinds.setdefault((type(block), parts), []).append(block)
        own = itertools.chain(model.parameters(), model.buffers())
        self._seen: dict[int, Any] = {one.untyped_storage()._cdata: None for one in own}

    def pass_of(self, batch: Batch, tokens: int, device: torch.device) -> "_KeptByBlocks":
        """Pass the first token of a batch forward, that many times, with one label."""
        ids = batch["input_ids"][:1, :1].expand(1, tokens).to(device)
        labels = ids.new_full(ids.shape, IGNORED)
        labels[0, -1] = 0
        row = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "task": batch["task"][:1]}
        hooks = [hook for alike in self._kinds.values() for hook in self._hooked(alike)]
        try:
            with saved_tensors_hooks(self._keep, lambda tensor: tensor):
                answer_logits(self._model, row)
        finally:
            for hook in hooks:
                hook.remove()
            for block in itertools.chain.from_iterable(alike[2:] for alike in self._kinds.values()):
                del block.forward
        self._seen.clear()
        return self

    def _hooked(self, alike: list[GradientCheckpointingLayer]) -> Iterator[RemovableHandle]:
        output: list[Any] = []

        def enter(module: nn.Module, _: Any) -> None:
            self._alike = 1 if module is alike[0] else len(alike) - 1

        def leave(module: nn.Module, _: Any, found: Any) -> None:
            self.inputs += self._alike * (found if isinstance(found, Tensor) else found[0]).nbytes
            self._alike, output[:] = 0, [found]

        for block in alike[2:]:
            block.forward = lambda *_, **__: output[0]
        for block in alike[:2]:
            yield block.register_forward_pre_hook(enter)
            yield block.register_forward_hook(leave)

    def _keep(self, tensor: Tensor) -> None:
        """Count a tensor that backward would read; nobody goes back, and a graph that kept it would hold itself."""
        if not self._alike or tensor.layout != torch.strided:  # sparse tensors are deltas
            return
        if (storage := tensor.untyped_storage())._cdata not in self._seen:
            self._seen[storage._cdata] = storage  # which stays, so that no other takes its place
            self.bytes += self._alike * storage.nbytes()
