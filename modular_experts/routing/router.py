"""Define the contract of a router, which scores the experts for each input and turns the scores into gates.

Read this file to write a router of your own: a class with `learn` and `scores`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from modular_experts.deltas import Delta
from modular_experts.routing.gates import Gates, Selection, TopK

Scope = Literal["sample", "linear"]

GRAMS = 2048
"""How many numbers stand for the n-grams of a prompt."""
Encode = Callable[[nn.Module, Sequence[Sequence[int]]], Tensor]
"""Reads prompts as texts: a function of the model and the tokens of each prompt that returns vectors `(rows, size)`."""
FOLDS = 4
"""Parts of the own prompts; each is measured by a router that learned from the other parts."""


class Router(nn.Module, ABC):
    """Chooses experts by the input; a subclass gives `__init__` with plain settings, `learn` and `scores`.

    A router of scope `sample` serves the whole model and chooses for whole rows. It sees each prompt as the means over
    its tokens of the base's hidden states at `depths`, each of length 1, one behind the other. Behind them come the
    vector of its text, if the router has an encoder (`TextRouter`), and its n-grams, if it `reads_grams`. In scope
    `linear` each weight has a router of its own, which sees the layer's inputs and chooses for each token.

    Args:
        select: Turns scores into gates; the best expert alone by default.
    """

    scope: ClassVar[Scope]

    needs: ClassVar[str | None] = None
    """The kind of statistics that `learn` needs of each expert, as `take_statistics` takes them. In scope `sample` it
    is `prompts`, or `prompt_parts`, where a part of each prompt follows it; in scope `linear` it is any other kind, and
    a router gets the statistics of its own weight."""

    rejects: bool = False
    """Whether the router may send an input to the fallback, whose number in gates is the number of experts."""

    depths: Sequence[float] = (0.0, 0.25)
    """Where prompts are read, rising: after these shares of the transformer blocks; 0 is the embeddings."""

    reads_grams: bool = False
    """Whether a router of scope `sample` also reads each prompt's n-grams of tokens (`prompt_grams`): `GRAMS` numbers
    behind the hidden states."""

    def __init__(self, select: Selection | None = None) -> None:
        super().__init__()
        self.select = select or TopK()
        self.experts = 0
        """Number of experts, known after `learn` or `load_state`."""

    def hear_tasks(self, tasks: Sequence[Sequence[str]]) -> None:
        """Take note of the names of each expert's tasks, before `learn`; most routers read inputs alone."""

    @abstractmethod
    def learn(self, deltas: Sequence[Delta | None], statistics: Sequence[Tensor]) -> None:
        """Set the router up for some experts: set `experts`, and keep the rest in buffers or parameters.

        Args:
            deltas: One for each expert. In scope `linear` its delta of the weight, `(out, in)`, or None where it has
                none; at least one expert has one. In scope `sample` each is None.
            statistics: What the router `needs`, one for each expert, float32: `prompts` and `prompt_parts` are vectors
                of prompts of the expert's tasks, `(rows, size)`. A tensor is empty where the expert has no statistics
                of the weight, and the list is empty if the router needs nothing.
        """

    @abstractmethod
    def scores(self, hidden: Tensor) -> Tensor:
        """Return how well each expert fits each input, `(n, experts)`, for hidden states `(n, size)`.

        These have the data type of the model, and buffers are float32: write `hidden.float()` where types must agree.
        """

    def held(self, deltas: Sequence[Delta | None]) -> tuple[Sequence[Delta | None], Delta | None]:
        """Return the deltas that gates weigh, and one that each input gets besides, or None.

        A router of scope `linear` is asked once, when its layer gets the experts, with the deltas as `learn` gets them.
        """
        return deltas, None

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


class TextRouter(Router):
    """A router of scope `sample` that may also read each prompt's text, by an encoder of sentences beside the base."""

    scope: ClassVar[Scope] = "sample"
    encoder: str | None = None
    """The encoder's directory or hub id; None reads no texts."""
    encode: Encode | None = None
    """The opened encoder (`base/sentence_encoder.py`), which `open_route` gives the router."""


def encoder_of(router: Router) -> str | None:
    """Return the directory or the hub id of a router's encoder of sentences; None if it has none."""
    return router.encoder if isinstance(router, TextRouter) else None


def check_reading(name: str, depths: Sequence[float], reject: float | None = None) -> None:
    """Raise ValueError unless a router can read prompts at these depths, and reject this share of them."""
    if not depths or not 0 <= min(depths) <= max(depths) <= 1:
        raise ValueError(f"{name}: depths={list(depths)} must be numbers from 0 to 1, at least one")
    if reject is not None and not 0 <= reject < 1:
        raise ValueError(f"{name}: reject={reject} is outside [0, 1)")


def check_fallback(router: Router, fallback: object) -> None:
    """Raise ValueError if there is a fallback that a router would never use."""
    if fallback is not None and not router.rejects:
        raise ValueError(
            f"{type(router).__name__} rejects no input here, so the fallback {fallback} would never be used; leave it "
            "out, or take Centroid, KernelRidge or Classifier with a number for reject"
        )


def check_prompts(name: str, prompts: Sequence[Tensor], least: int) -> None:
    """Raise ValueError if an expert has too few vectors of prompts to learn from."""
    for number, rows in enumerate(prompts):
        if len(rows) < least:
            prompts_text = "1 prompt" if len(rows) == 1 else f"{len(rows)} prompts"
            raise ValueError(
                f"{name}: expert {number} has {prompts_text}, and at least {least} are needed; give its task more rows"
            )


def means_and_precision(prompts: Sequence[Tensor], shrink: float) -> tuple[Tensor, Tensor]:
    """Return the means `(experts, size)` and the inverse of the shrunk covariance `(size, size)` of prompts."""
    means = torch.stack([rows.mean(0) for rows in prompts])
    around = torch.cat([rows - mean for rows, mean in zip(prompts, means, strict=True)])
    covariance = around.T @ around / max(len(around) - len(prompts), 1)
    if not covariance.any():
        raise ValueError(
            f"no expert has two different prompts among the {len(around)} that the router learns from, so it cannot "
            "measure distances; give the tasks more rows"
        )
    size = len(covariance)
    identity = torch.eye(size, dtype=covariance.dtype, device=covariance.device)
    shrunk = (1 - shrink) * covariance + shrink * covariance.trace() / size * identity
    return means, torch.linalg.inv(shrunk)
