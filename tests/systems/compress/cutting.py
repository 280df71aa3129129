"""Models to cut in float64, and parts that stay of them, for the tests of `compress`."""

import conftest
import torch
from transformers import PreTrainedModel

from modular_experts.systems.compress.removable import Kept, Removable

GROUPED = ["llama", "qwen2", "qwen3", "phi3"]


def model_of(architecture: str, layers: int = 4, **changes: object) -> PreTrainedModel:
    """Return a random model in float64 whose biases and norms are random too."""
    kinds = {"layer_types": ["full_attention"] * layers} if architecture.startswith("qwen") else {}
    model = conftest.build_model(architecture, **{"num_hidden_layers": layers} | kinds | changes).double()
    numbers = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.data += 0.1 * torch.randn(weight.shape, dtype=weight.dtype, generator=numbers)
    return model


def some(removable: Removable, groups: int, channels: int) -> Kept:
    """Return blocks 0, 2 and 3 with other groups and channels in each, not contiguous."""
    numbers = torch.Generator().manual_seed(2)
    kept: dict[str, dict[int, torch.Tensor]] = {"groups": {}, "channels": {}}
    for block in (0, 2, 3):
        kept["groups"][block] = torch.randperm(removable.groups, generator=numbers)[:groups].sort().values
        kept["channels"][block] = torch.randperm(removable.channels, generator=numbers)[:channels].sort().values
    return Kept((0, 2, 3), **kept)
