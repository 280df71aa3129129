"""Selection: which units layers are to keep, from a score over some batches, alone or in competition with each other.

When a selection is due, and what becomes of values and moments, is the business of `mask_schedule`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from modular_experts.experts.selectable import Selectable
from modular_experts.library import StoredExpert
from modular_experts.masks import Rule, Score, StreamingTopK
from modular_experts.selection.avoid import count_others, crowded, refuse_too_few
from modular_experts.selection.scoring import MemoryWatch, ScoringPass
from modular_experts.text import block_of

__all__ = ["Scope", "Selection"]

Scope = Literal["layer", "block", "global"]
Layers = Mapping[str, Any]


@dataclass
class Selection:
    """One choice of supports.

    Args:
        score: Ranks the entries; each expert type's own if not given.
        rule: How the support changes; each expert type's own if not given.
        scope: Within what the units compete: each weight, each transformer block, or all weights.
        norm: A tile's score is the norm of its entries' scores instead of their sum.
        others: Experts to stay away from.
        penalty: By how much; with none, what they keep is excluded.
        position: The optimizer step about to be taken.
        last: The step after which nothing is chosen.
        seed: Of random scores.
        may_resize: Whether packed experts may keep another number of units than before.
    """

    score: Score | Callable[..., Any] | None
    rule: Rule | None
    scope: Scope
    norm: bool
    others: Sequence[StoredExpert]
    penalty: float | None
    position: int
    last: int
    seed: int
    may_resize: bool
    chosen: dict[str, Tensor] = field(default_factory=dict)
    """The units to keep of each weight so far."""
    _streams: dict[str, StreamingTopK] = field(default_factory=dict)
    _free: dict[str, int] = field(default_factory=dict)
    _units: dict[str, int] = field(default_factory=dict)
    _kept: dict[bool, tuple[int, int]] = field(default_factory=dict)

    def make(self, layers: Layers, scoring: Callable[[], ScoringPass], memory: MemoryWatch) -> int:
        """Choose for layers with selectable experts, into `chosen`; return how many passes over batches it took.

        Args:
            layers: The layers, by the names of their weights.
            scoring: Draws the batches; it is not called if no score asks for them.
            memory: Looks at the memory in use while scores are taken.
        """
        passes = 0
        by_statistic: dict[str, dict[str, Any]] = {}
        for name, layer in layers.items():
            by_statistic.setdefault(getattr(self._score(layer.expert), "statistic", "gradient"), {})[name] = layer
        self._count_kept(layers)
        self._open_streams(layers)

        def receive(name: str, statistic: Tensor) -> None:
            memory.look()
            self._take(name, layers[name], statistic)

        for statistic, part in by_statistic.items():
            if statistic == "none":
                for name, layer in part.items():
                    receive(name, torch.zeros((), device=layer.matrix.device).expand(layer.matrix.shape))
                continue
            score_pass, experts = scoring(), {name: layer.expert for name, layer in part.items()}
            if statistic == "curvature":
                score_pass.curvature(experts, receive, {name: layer.matrix.detach() for name, layer in part.items()})
            else:
                getattr(score_pass, statistic)(experts, receive)
            passes += score_pass.passes
        self._close_streams()
        return passes

    def _score(self, expert: Selectable) -> Score | Callable[..., Any]:
        return self.score or expert.score

    def _rule(self, expert: Selectable) -> Rule:
        return self.rule or expert.rule

    @torch.no_grad()
    def _take(self, name: str, layer: Any, statistic: Tensor) -> None:
        expert = layer.expert
        torch.manual_seed(zlib.crc32(f"{self.seed}/{self.position}/{name}".encode()))
        weight = expert.scored_weight(layer.matrix)
        scores = self._score(expert)(weight, statistic, expert.scored_delta(layer.matrix))
        if scores.shape != expert.shape:
            raise ValueError(f"the score gave shape {tuple(scores.shape)} for {name}, of shape {tuple(expert.shape)}")
        scores = scores if scores.is_floating_point() else scores.float()
        scores, group = expert.unit_scores(scores, self.norm), self._group(name)
        competes, free = self._competes(expert), expert.units
        if self.others:
            others = count_others(name, layer, self.others)
            scores = crowded(scores, others, self.penalty)
            free = expert.units if self.penalty is not None else int((others == 0).sum())
        if competes:
            self._free[group] = self._free.get(group, 0) + free
            self._units[group] = self._units.get(group, 0) + expert.units
            self._streams[group].add(name, scores)
            return
        anew = self._starts_anew(expert)
        if anew:
            refuse_too_few(free, expert.units, expert.kept_units)
        kept, change = expert.support_units(), expert.unit_change()
        k = expert.kept_units if anew else kept.numel()
        self.chosen[name] = self._rule(expert).choose(scores, k, kept, change, self.position, self.last).to(kept.dtype)

    def _competes(self, expert: Selectable) -> bool:
        """Return whether this layer's number of units is decided among several layers."""
        resizable = expert.packed is None or self.may_resize
        return self.scope != "layer" and resizable and self._starts_anew(expert)

    def _starts_anew(self, expert: Selectable) -> bool:
        """Return whether the old support is left out of account: what a dense start shows is known by all layers, as
        one of them may keep everything after a choice among all.
        """
        return self._rule(expert).starts_anew(self.position, *self._kept[expert.packed is None])

    def _count_kept(self, layers: Layers) -> None:
        for expert in (layer.expert for layer in layers.values()):
            kept, units = self._kept.get(expert.packed is None, (0, 0))
            self._kept[expert.packed is None] = (kept + expert.support_units().numel(), units + expert.units)

    def _open_streams(self, layers: Layers) -> None:
        budgets: dict[str, int] = {}
        for name, layer in layers.items():
            if self._competes(layer.expert):
                budgets[self._group(name)] = budgets.get(self._group(name), 0) + layer.expert.kept_units
        self._streams = {group: StreamingTopK(k) for group, k in budgets.items()}

    def _close_streams(self) -> None:
        for group, stream in self._streams.items():
            refuse_too_few(self._free[group], self._units[group], stream.k)
            self.chosen |= stream.finish()

    def _group(self, name: str) -> str:
        """Return what the weight competes in: its own name, that of its transformer block, or everything."""
        if self.scope == "block":
            return block_of(name) or name
        return "" if self.scope == "global" else name
