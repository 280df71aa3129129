"""Compare gradients with and without gradient checkpointing."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def check_checkpointing(make: Callable[[], nn.Module], loss: Callable[[nn.Module], Tensor]) -> None:
    """Check that a model's gradients are the same with checkpointing, and that each has a number that is not zero."""
    found = []
    for checkpointing in (False, True):
        model = make().train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        loss(model).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert gradient.any(), name
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-12)
