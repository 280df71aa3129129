"""Compare gradients with and without gradient checkpointing, and count what is kept for backward."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def check_checkpointing(
    make: Callable[[], nn.Module], loss: Callable[[nn.Module], Tensor], all_learn: bool = True
) -> None:
    """Check that gradients are the same with checkpointing, and that each, or at least one, has a number but zero."""
    found = []
    for checkpointing in (False, True):
        model = make().train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        loss(model).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    assert any(gradient.any() for gradient in found[0].values())
    for name, gradient in found[0].items():
        assert gradient.any() or not all_learn, name
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-12)


def saved_for_backward(model: nn.Module, make_loss: Callable[[], Tensor]) -> tuple[int, int]:
    """Return the bytes that a forward pass keeps for backward, without the model's own, and without small ones."""
    own = {one.untyped_storage()._cdata for one in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # which stays, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = make_loss()
    sizes = [storage.nbytes() for place, storage in kept.items() if place not in own]
    assert loss.requires_grad
    return sum(sizes), sum(size for size in sizes if size > 512)
