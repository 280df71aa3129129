"""Choose which units layers keep, from a score over some batches, or from another expert."""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from modular_experts.deltas import Delta
from modular_experts.experts.selectable import Selectable
from modular_experts.injection import expert_layers
from modular_experts.library import StoredExpert
from modular_experts.masks import GradientStatistic, Rule, Score


class SelectableLayer(Protocol):
    """A linear layer whose expert trains a chosen support."""

    @property
    def expert(self) -> Selectable: ...

    @property
    def matrix(self) -> Tensor:
        """The weight as the expert sees it, `(out, in)`."""

    def oriented(self, delta: Delta) -> Delta:
        """Return a delta as the expert sees it in the orientation of the stored weight, or the other way round."""


ScoreFunction = Score | Callable[[Tensor, Tensor, Delta], Tensor]
"""A score, or any function of (weight, gradient, delta) that returns one number for each entry."""

Layers = Mapping[str, SelectableLayer]
"""Layers by the names of their weights."""


def selectable_layers(model: nn.Module) -> dict[str, SelectableLayer]:
    """Return the layers whose experts train a chosen support, by the names of their weights, sorted."""
    layers = {name: layer for name, layer in expert_layers(model) if isinstance(layer.expert, Selectable)}
    return cast(dict[str, SelectableLayer], layers)


def statistic_of(expert: Selectable, score: ScoreFunction | None) -> GradientStatistic:
    """Return the statistic that a score, or else the expert's own, ranks entries by."""
    return getattr(score or expert.score, "statistic", "gradient")


@dataclass
class SupportChoice:
    """One choice of supports, which takes the statistic of one weight after the other, in any order.

    Args:
        layers: The layers to choose for.
        position: The optimizer step about to be taken, or the micro-batch if the rule counts micro-batches.
        lengths: Positions in the whole fit and in an epoch, as `Rule.last_update` takes them.
        score, rule, seed: As for `MaskSchedule`.
        chosen: The units to keep of each weight whose statistic arrived.
    """

    layers: Layers
    position: int
    lengths: tuple[int, int]
    score: ScoreFunction | None = None
    rule: Rule | None = None
    seed: int = 0
    chosen: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def receive(self, name: str, statistic: Tensor) -> None:
        """Rank the units of one weight by its statistic, and choose.

        Raises:
            ValueError: The score has another shape than its weight.
        """
        layer = self.layers[name]
        expert = layer.expert
        # Ranks draw random scores alike, and a layer's draw does not depend on the order of layers.
        torch.manual_seed(zlib.crc32(f"{self.seed}/{self.position}/{name}".encode()))
        weight, delta = expert.scored(layer.matrix)
        scores = (self.score or expert.score)(weight, statistic, delta)
        if scores.shape != expert.shape:
            raise ValueError(f"the score gave shape {tuple(scores.shape)} for {name}, of shape {tuple(expert.shape)}")
        scores = expert.unit_scores(scores if scores.is_floating_point() else scores.float())
        before = expert.support_units()
        rule = self.rule or expert.rule
        # A dense start keeps every unit until its first choice, which brings it down to the expert's own number.
        anew = rule.starts_anew(self.position, before.numel(), expert.units)
        k = expert.kept_units if anew else before.numel()
        last = rule.last_update(*self.lengths)
        chosen = rule.choose(scores, k, before, expert.unit_change(), self.position, last)
        self.chosen[name] = chosen.to(before.dtype)


def shared_units(name: str, layer: SelectableLayer, other: StoredExpert) -> Tensor:
    """Return the units that another expert keeps of a layer's weight; raise ValueError if it keeps other units."""
    tile = layer.expert.tile
    kept = "nothing"
    if name in other:
        sparse = layer.oriented(other[name]).units
        if sparse is None:
            kept = "every entry"
        else:
            (height, width), units = sparse
            if (height, width) == tile:
                return units.to(layer.matrix.device)
            kept = "single entries" if (height, width) == (1, 1) else f"tiles of {height} x {width}"
    raise ValueError(
        f"the support of {other.name} cannot be shared: it keeps {kept} at {name}, not units of {tile[0]} x {tile[1]}; "
        "use the granularity, block size and modules of that expert"
    )
