"""Choose which units layers keep, from a score over some batches; weights may compete with each other.

`MaskSchedule` decides when a choice is made and moves the experts to it. Rules (`masks/rules.py`) decide how a new
support follows from the old one.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from modular_experts.experts.selectable import Selectable
from modular_experts.library import StoredExpert
from modular_experts.masks import GradientStatistic, Rule, Score, StreamingTopK
from modular_experts.selection.avoid import count_others, crowded, refuse_too_few
from modular_experts.selection.scoring import Layers, MemoryWatch, ScoringPass, SelectableLayer
from modular_experts.text import block_of

ScoreScope = Literal["layer", "block", "global"]


@dataclass(frozen=True)
class SupportSettings:
    """How supports are chosen, the same for all choices of a training; the settings are as in `MaskSchedule`.

    Args:
        norm: Whether a tile's score is the norm of its entries' scores instead of their sum.
        others: The opened experts to avoid.
    """

    score: Score | Callable[..., Any] | None = None
    rule: Rule | None = None
    scope: ScoreScope = "layer"
    norm: bool = False
    others: Sequence[StoredExpert] = ()
    penalty: float | None = None
    seed: int = 0

    def choose(
        self,
        layers: Layers,
        scoring: Callable[[], ScoringPass],
        memory: MemoryWatch,
        position: int,
        last: int,
        resize: bool = False,
    ) -> tuple[dict[str, Tensor], int]:
        """Return the units to keep of each layer, by the name of its weight, and how many passes over batches it took.

        Args:
            layers: The layers to choose for.
            scoring: Draws the batches; called once for each statistic of the loss that scores ask for.
            memory: Looks at the memory in use whenever a statistic arrives.
            position: The optimizer step about to be taken, or the micro-batch if the rule counts micro-batches.
            last: The position after which nothing is chosen.
            resize: Whether packed experts may keep another number of units than before.

        Raises:
            ValueError: A score has another shape than its weight, or the others leave too few units.
        """
        choice = Choice(self, layers, memory, position, last, resize)
        by_statistic: dict[str, dict[str, SelectableLayer]] = {}
        for name, layer in layers.items():
            by_statistic.setdefault(self.statistic(layer.expert), {})[name] = layer
        passes = 0
        for statistic, part in by_statistic.items():
            if statistic == "none":
                for name, layer in part.items():
                    choice.receive(name, torch.zeros((), device=layer.matrix.device).expand(layer.matrix.shape))
            else:
                drawn = scoring()
                getattr(drawn, statistic)(part, choice.receive)
                passes += drawn.passes
        return choice.finish(), passes

    def statistic(self, expert: Selectable) -> GradientStatistic:
        """Return what the score of an expert asks for."""
        return getattr(self._score(expert), "statistic", "gradient")

    def starts_anew(self, layers: Layers, position: int) -> dict[str, bool]:
        """Return for each layer whether a choice at `position` ignores its old support."""
        # It is decided for all layers of a kind together: after a choice among all weights, one of them may keep
        # everything although training is past its dense start.
        kept, units = Counter[bool](), Counter[bool]()
        for layer in layers.values():
            packed = layer.expert.packed is not None
            kept[packed] += layer.expert.support_units().numel()
            units[packed] += layer.expert.units
        anew = {}
        for name, layer in layers.items():
            packed = layer.expert.packed is not None
            anew[name] = self.rule_of(layer.expert).starts_anew(position, kept[packed], units[packed])
        return anew

    def unit_scores(self, name: str, layer: SelectableLayer, statistic: Tensor, position: int) -> tuple[Tensor, int]:
        """Return the score of each unit `(units,)`, lower where other experts are, and how many units may be kept."""
        expert = layer.expert
        _seed(zlib.crc32(f"{self.seed}/{position}/{name}".encode()), layer.matrix.device)
        weight, delta = expert.scored(layer.matrix)
        scores = self._score(expert)(weight, statistic, delta)
        if scores.shape != expert.shape:
            raise ValueError(f"the score gave shape {tuple(scores.shape)} for {name}, of shape {tuple(expert.shape)}")
        scores = expert.unit_scores(scores if scores.is_floating_point() else scores.float(), self.norm)
        if not self.others:
            return scores, expert.units
        keepers = count_others(name, layer, self.others)
        free = expert.units if self.penalty is not None else int((keepers == 0).sum())
        return crowded(scores, keepers, self.penalty), free

    def _score(self, expert: Selectable) -> Score | Callable[..., Any]:
        return self.score or expert.score

    def rule_of(self, expert: Selectable) -> Rule:
        """Return the rule of an expert: the one that is set, or its type's."""
        return self.rule or expert.rule


def _seed(seed: int, device: torch.device) -> None:
    if device.type == "cpu":
        # torch.manual_seed notes the whole stack for each kind of device, which took a tenth of a choice's time.
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


class Choice:
    """One choice, which takes the statistic of one weight after the other, in any order.

    Args:
        selection: How supports are chosen.
        layers, memory, position, last, resize: As for `SupportSettings.choose`.
    """

    def __init__(
        self,
        selection: SupportSettings,
        layers: Layers,
        memory: MemoryWatch,
        position: int,
        last: int,
        resize: bool = False,
    ) -> None:
        self.selection, self.layers, self.memory = selection, layers, memory
        self.position, self.last = position, last
        self.chosen: dict[str, Tensor] = {}
        """The units to keep of each weight for which that is known."""
        self._anew = selection.starts_anew(layers, position)
        # Weights that compete divide among them as many units as they would keep alone.
        self._groups = {
            name: "" if selection.scope == "global" else block_of(name) or name
            for name, layer in layers.items()
            if selection.scope != "layer" and self._anew[name] and (resize or layer.expert.packed is None)
        }
        budgets, self._total, self._free = Counter[str](), Counter[str](), Counter[str]()
        for name, group in self._groups.items():
            budgets[group] += layers[name].expert.kept_units
            self._total[group] += layers[name].expert.units
        self._best = {group: StreamingTopK(budget) for group, budget in budgets.items()}

    @torch.no_grad()
    def receive(self, name: str, statistic: Tensor) -> None:
        """Rank the units of one weight, and choose unless it competes with others."""
        self.memory.look()
        expert, selection = self.layers[name].expert, self.selection
        scores, available = selection.unit_scores(name, self.layers[name], statistic, self.position)
        if name in self._groups:
            self._best[self._groups[name]].add(name, scores)
            self._free[self._groups[name]] += available
            return
        if self._anew[name]:
            refuse_too_few(available, expert.units, expert.kept_units)
        before = expert.support_units()
        k = expert.kept_units if self._anew[name] else before.numel()
        rule, change = selection.rule_of(expert), expert.unit_change()
        self.chosen[name] = rule.choose(scores, k, before, change, self.position, self.last).to(before.dtype)

    def finish(self) -> dict[str, Tensor]:
        """Return the units to keep of each weight whose statistic arrived."""
        for group, stream in self._best.items():
            refuse_too_few(self._free[group], self._total[group], stream.k)
            self.chosen |= stream.finish()
        return self.chosen
