"""Correct the layers that read removed parts, in closed form, so that their outputs on calibration text stay near.

A layer with the weight W0 `(out, in)` reads inputs X `(tokens, in)`, of which the columns S stay. The weight W'_S
`(out, S)` minimises `||X W0^T - X_S W'_S^T||^2 + lambda ||W'_S - W0_S||^2`, so with `G = X^T X`

    W'_S^T = (G_SS + lambda I)^-1 (G_S W0^T + lambda W0_S^T).

The paper (Search for efficient LLMs, arXiv 2409.17372) minimises the first term by ADMM, whose limit at lambda = 0 this
is. With the second term the error on the text never grows, and a layer that loses no input stays as it is.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modular_experts.routing.prompts import states_at
from modular_experts.systems.compress.removable import Kept, Removable, oriented

DAMPING = 0.01
"""Lambda, and the numbers added to a diagonal before it is inverted, as a share of the mean of the diagonal."""


def reformed(weight: Tensor, gram: Tensor, kept: Tensor) -> Tensor:
    """Return the weight `(out, kept)` for the inputs that stay, in float64, by the Gram matrix `(in, in)` of all."""
    whole = weight.double()
    matrix = gram.double()
    left = matrix[kept][:, kept]
    mean = left.diagonal().mean()
    # A layer that no text reaches keeps its weight.
    pull = DAMPING * mean if mean > 0 else torch.ones_like(mean)
    left = left + pull * torch.eye(len(kept), dtype=left.dtype, device=left.device)
    gone = torch.ones(whole.shape[1], dtype=torch.bool, device=kept.device).index_fill_(0, kept, False)
    # The equations of W' - W0_S, which are the same with less rounding.
    moved = torch.linalg.solve(left, matrix[kept][:, gone] @ whole[:, gone].T)
    return whole[:, kept] + moved.T


@torch.no_grad()
def reform(
    removable: Removable,
    kept: Kept,
    small: PreTrainedModel,
    text: Tensor,
    progress: Callable[[int], None] = lambda done: None,
) -> int:
    """Correct a model that was cut to `kept`, in place, block after block; return how many layers were corrected.

    The inputs of a block are those that the reformed blocks before it make of the text `(rows, tokens)`.
    """
    whole = BlockByBlock(removable, removable.model, text)
    parts = BlockByBlock(removable, small, text)
    count = 0
    hidden = whole.embedded
    for place, number in enumerate(kept.blocks):
        grams, _ = whole.grams(number, hidden, removable.readers.values())
        for name in removable.readers.values():
            indices = removable.indices(removable.parts[f"{name}.weight"], kept, number).to(grams[name].device)
            if len(indices) < len(grams[name]):
                weight = oriented(whole.blocks[number].get_submodule(name))
                oriented(parts.blocks[place].get_submodule(name)).copy_(reformed(weight, grams[name], indices))
                count += 1
        hidden = parts.through(place, hidden)
        progress(place + 1)
    return count


class BlockByBlock:
    """A model, whole or cut, that runs one block at a time over a text `(rows, tokens)`; each row is a pass of its own.

    For each row, `embedded` has the hidden states `(1, tokens, hidden)` that enter the first block.
    """

    def __init__(self, removable: Removable, model: PreTrainedModel, text: Tensor) -> None:
        self.blocks = removable.modules(model)
        self.embedded: list[Tensor] = []
        self._others: list[tuple[tuple[object, ...], dict[str, object]]] = []
        rows = text.to(model.device).split(1)

        def note(_: nn.Module, inputs: tuple[object, ...], named: dict[str, object]) -> None:
            # Positions and masks are alike in all rows, because all are of one length and without padding.
            self._others.append((inputs[1:], named))

        with ExitStack() as hooks:
            for block in self.blocks:
                hooks.callback(block.register_forward_pre_hook(note, with_kwargs=True).remove)
            model.base_model(rows[0], use_cache=False)
        for row in rows:
            with states_at(self.blocks[0]) as reached:
                model.base_model(row, use_cache=False)
            self.embedded += reached

    def through(self, place: int, hidden: list[Tensor]) -> list[Tensor]:
        """Return what a block makes of the hidden states of each row."""
        others, named = self._others[place]
        outputs = [self.blocks[place](states, *others, **named) for states in hidden]
        return [output[0] if isinstance(output, tuple) else output for output in outputs]

    def grams(self, place: int, hidden: list[Tensor], layers: Iterable[str]) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Return `X^T X` of the inputs of layers of a block, by their names there, and the block's outputs."""
        grams: dict[str, Tensor] = {}

        def take(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs = args[0].reshape(-1, args[0].shape[-1])
            product = inputs.T @ inputs
            grams[name] = grams[name] + product if name in grams else product

        with ExitStack() as hooks:
            for name in layers:
                layer = self.blocks[place].get_submodule(name)
                hooks.callback(layer.register_forward_pre_hook(partial(take, name)).remove)
            made = self.through(place, hidden)
        return grams, made
