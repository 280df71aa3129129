"""A mixture holds the deltas of several experts at one linear layer, and gives each input those that its gates name.

`BlockRouter` makes the gates that all mixtures of a transformer block read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modular_experts.deltas import Delta
from modular_experts.experts.expert import Expert, NotMergeable
from modular_experts.experts.module_expert import ModuleExpert
from modular_experts.routing.gates import CurrentGates, Gates
from modular_experts.routing.products import Held, add_change, add_products
from modular_experts.routing.router import Router


class Mixture(NotMergeable, Expert):
    """Adds to the base's output those of the experts that an input's gates name.

    One product with the base's weight serves all inputs, and each expert's delta multiplies its own inputs only. A gate
    is made for a whole row of a batch (scope `sample`), or for each token by a router of the transformer block (scope
    `block`) or of this layer (scope `linear`).

    Args:
        weight: The base weight `(out, in)`.
        deltas: Each expert's delta of the weight, None where it has none; the last one is the fallback's, which takes
            the number of experts as its own.
        gates: Where the gates of the pass at hand are, for the scopes `sample` and `block`.
        router: The layer's own router, for scope `linear`.
        biases: Each expert's delta of the layer's bias, if any has one.
        common: A delta of the weight that every input gets, whatever its gates.
    """

    not_mergeable_because: ClassVar[str] = "its router chooses experts by the input"

    def __init__(
        self,
        weight: Tensor,
        deltas: Sequence[Delta | None],
        gates: CurrentGates,
        router: Router | None = None,
        biases: Sequence[Delta | None] = (),
        common: Delta | None = None,
    ) -> None:
        super().__init__()
        self.dtype = weight.dtype
        self.deltas = [None if delta is None or delta.is_empty else Held(delta, self.dtype) for delta in deltas]
        self.biases = [None if bias is None else bias.dense() for bias in biases]
        self.gates, self.router, self.common = gates, router, common

    @property
    def moves_tokens_alone(self) -> bool:
        """Whether each place of packed rows has its own gates: the layer's router makes them, or they are its row's."""
        return self.router is not None or self.gates.packs

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._added(F.linear(x, weight, bias), x)

    def beneath(self, layer: nn.Module, arguments: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """Add to what a layer gives with another expert in it, as the layer's forward hook."""
        return self._added(out.clone(memory_format=torch.contiguous_format), arguments[0])

    def _added(self, out: Tensor, x: Tensor) -> Tensor:
        if self.common is not None:
            out = out + self.common.linear(x)
        gates = self._gates(x)
        if gates is None:
            return out
        inputs = x.to(out.dtype).reshape(len(gates.ids), -1, x.shape[-1]).contiguous()
        added = out.view(len(gates.ids), -1, out.shape[-1])
        add_products(added, inputs, self.deltas, gates.segments)
        for expert, places, weights in gates.segments if self.biases else ():
            moved = self.biases[expert]
            if moved is not None:
                change = moved.to(out.dtype).expand(len(inputs) if places is None else len(places), *added.shape[1:])
                add_change(added, change, places, weights)
        return added.view_as(out)

    def _gates(self, x: Tensor) -> Gates | None:
        if self.router is None:
            return self.gates.gates
        return self.router(x.reshape(-1, x.shape[-1]))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Mixture:
        super()._apply(fn, recurse)
        like = fn(torch.empty(0, dtype=self.dtype))
        self.dtype = like.dtype
        self.deltas = [None if delta is None else delta.to(like.device, like.dtype) for delta in self.deltas]
        self.biases = [None if bias is None else bias.to(like.device) for bias in self.biases]
        self.common = None if self.common is None else self.common.to(like.device)
        return self


class BlockRouter(ModuleExpert):
    """Shows each token that enters a transformer block to a router, and its gates to the mixtures inside.

    Args:
        router: The block's router.
        gates: Where the mixtures of the block read them.
    """

    not_mergeable_because: ClassVar[str] = Mixture.not_mergeable_because

    def __init__(self, router: Router, gates: CurrentGates) -> None:
        super().__init__()
        self.router, self.gates = router, gates

    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self.gates.gates = self.router(hidden.reshape(-1, hidden.shape[-1]))
