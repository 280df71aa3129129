"""Define the contract of a router, which scores the experts for each input and turns the scores into gates.

Read this file to write a router of your own: a class with `learn` and `scores`. A router of scope `sample` scores whole
prompts, one of scope `linear` the inputs of one linear layer. `injection/routed.py` puts routers into a model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from torch import Tensor, nn

from modular_experts.deltas import Delta
from modular_experts.routing.gates import Gates, Selection, TopK

Scope = Literal["sample", "linear"]


class Router(nn.Module, ABC):
    """Chooses experts by the input; a subclass gives `__init__` with plain settings, `learn` and `scores`.

    Of scope `sample` there is one router for the model, which chooses for whole rows. It sees each prompt as the means
    over its tokens of the base's hidden states at `depths`, each of length 1, one behind the other. Of scope `linear`
    there is one for each weight, which sees the layer's inputs and chooses for each token.

    Args:
        select: Turns scores into gates; the best expert alone by default.
    """

    scope: ClassVar[Scope]
    needs_prompts: ClassVar[bool] = False
    """Whether `learn` needs the vectors of prompts, which `statistics --kind prompts` takes."""

    depths: Sequence[float] = (0.0, 0.25)
    """Where prompts are read, rising: after these shares of the transformer blocks; 0 is the embeddings."""

    def __init__(self, select: Selection | None = None) -> None:
        super().__init__()
        self.select = select or TopK()
        self.experts = 0
        """Number of experts, known after `learn` or `load_state`."""

    @abstractmethod
    def learn(self, deltas: Sequence[Delta | None], prompts: Sequence[Tensor]) -> None:
        """Set the router up for some experts; what it finds out is kept in buffers or parameters.

        Args:
            deltas: Of scope `linear`, each expert's delta of the weight, `(out, in)`, or None where it has none. Of
                scope `sample`, empty.
            prompts: If `needs_prompts`, the prompts of each expert's tasks, `(rows, size)` float32. Empty otherwise.
        """

    @abstractmethod
    def scores(self, hidden: Tensor) -> Tensor:
        """Return how well each expert fits each input, `(n, experts)`, for hidden states `(n, size)`."""

    def forward(self, hidden: Tensor) -> Gates:
        """Return the gates of `n` inputs `(n, size)`."""
        return self.select(self.scores(hidden))

    def state(self) -> dict[str, Tensor]:
        """Return what `learn` found out, which the library keeps."""
        return dict(self.state_dict())

    def load_state(self, state: Mapping[str, Tensor], experts: int) -> None:
        """Take up what `state` returned, in a router made with the same settings.

        Raises:
            RuntimeError: A tensor is missing or has nowhere to go.
        """
        self.experts = experts
        for name, tensor in state.items():
            if name in self._buffers:
                self._buffers[name] = tensor
        self.load_state_dict(dict(state))
