"""Layers: the modules of a base that an adapter may sit on, and how each of them keeps its weight.

`nn.Linear` keeps `(out, in)`; GPT-2's `Conv1D` keeps the same matrix transposed; an embedding keeps one row for each
token. Adapters speak of the first, deltas of what the base's parameter is.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from modular_experts.base.checkpoint import quiet

__all__ = ["is_embedding", "is_linear", "is_transposed", "nearest", "read_layers", "shared_weights"]


def read_layers(directory: Path) -> PreTrainedModel:
    """Return the model of a checkpoint with all its modules and none of its numbers: they take no memory."""
    with quiet(), torch.device("meta"):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def is_linear(module: nn.Module) -> bool:
    """Return whether the module multiplies with a weight kept as `(out, in)`."""
    return isinstance(module, nn.Linear)


def is_transposed(module: nn.Module) -> bool:
    """Return whether the module multiplies with a weight kept as `(in, out)`."""
    return isinstance(module, Conv1D)


def is_embedding(module: nn.Module) -> bool:
    """Return whether the module keeps a row for each token."""
    return isinstance(module, nn.Embedding)


def shared_weights(model: nn.Module) -> set[str]:
    """Return the names of the weights that are one tensor with another one (tied)."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    owners = Counter(id(parameter) for parameter in parameters.values())
    return {name for name, parameter in parameters.items() if owners[id(parameter)] > 1}


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `; the nearest is x`, or nothing where no known name is near."""
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"; the nearest is {found[0]}" if found else ""
