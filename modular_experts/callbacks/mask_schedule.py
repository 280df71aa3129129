"""MaskSchedule: when the kept entries of selectable experts are chosen, on which batches, and what becomes of those
that leave.

Which entries a score prefers, and how a new support follows from the old, is said in `masks`. Scores are taken in
optimizer steps from gradients averaged over all ranks, so every rank keeps the same entries.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
import zlib
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from modular_experts.callbacks.scoring import scoring_pass
from modular_experts.experts.selectable import Selectable
from modular_experts.injection import expert_layers
from modular_experts.masks import Reselect, Rule, Score

__all__ = ["MaskSchedule"]

log = logging.getLogger(__name__)


class MaskSchedule(Callback):
    """Chooses what sparse and masked experts train: before the first step, and again as the rule says.

    Args:
        score: Ranks the entries: a class such as `SNIP`, or a function of (weight, gradient, delta). Each expert type
            has a default: `GradientMagnitude` for `SparseExpert`, the paper's `ConnectionSensitivity` for
            `MaskedExpert`.
        rule: When and how the support changes: `SelectOnce`, `Reselect` or `GrowAndDrop`. Each expert type has a
            default: `GrowAndDrop` for `SparseExpert`, `Reselect` in the first epoch for `MaskedExpert`.
        batches: Training batches over which a gradient is averaged before it is scored.
        leavers: What becomes of the value of an entry that leaves a sparse expert: `revert` forgets it, `stash` keeps
            it aside, and the entry resumes from it if it comes back. (A masked expert always hides, never forgets.)
        seed: Seeds the batches and the random scores of each selection; the run's own (`seed_everything`) if none is
            given.
        accumulator_mib: Memory for gradient accumulators when `batches` is above 1, in MiB; layers beyond it go in
            further passes.
    """

    asked_for = True  # `ExpertModule` takes this from the one that it adds by itself

    def __init__(
        self,
        score: Score | Callable[..., Any] | None = None,
        rule: Rule | None = None,
        batches: int = 4,
        leavers: Literal["revert", "stash"] = "revert",
        seed: int | None = None,
        accumulator_mib: int = 1024,
    ) -> None:
        if batches < 1:
            raise ValueError(f"batches={batches} must be at least 1: a score needs a gradient")
        self.score, self.rule, self.batches = score, rule, batches
        self.leavers, self.accumulator_mib = leavers, accumulator_mib
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        self.selections = 0
        self.seconds = 0.0
        self._last_position = -1
        self._touched: dict[str, Tensor] = {}
        self._stash: dict[str, tuple[Tensor, Tensor]] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Say so where a schedule that somebody asked for has nothing to choose."""
        experts = [layer.expert for _, layer in expert_layers(pl_module.model)]
        if self.asked_for and trainer.is_global_zero and not any(isinstance(e, Selectable) for e in experts):
            kinds = ", ".join(sorted({type(expert).__name__ for expert in experts}))
            log.warning("MaskSchedule has no effect: it chooses for sparse and masked experts, and these are %s", kinds)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Select where the rule says so; the score sees batches of its own, not the one about to be trained on."""
        layers: dict[str, Any] = {
            name: layer for name, layer in expert_layers(pl_module.model) if isinstance(layer.expert, Selectable)
        }
        if not layers:
            return
        position, last = self._clock(trainer, pl_module, next(iter(layers.values())).expert)
        if position == self._last_position:
            return  # a later micro-batch of the same optimizer step
        self._last_position = position
        due = {name: layer for name, layer in layers.items() if self._is_due(layer.expert, position, last)}
        if due:
            started = time.perf_counter()
            with torch.random.fork_rng():
                chosen = self._choose(trainer, pl_module, due, position, last)
            for name, units in chosen.items():
                self._move(trainer, name, due[name], units)
            self.selections += 1
            self.seconds += time.perf_counter() - started

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Say what was kept, and what was ever touched on the way."""
        shares = self.shares(pl_module)
        if shares:
            log.info(
                "selections of the support: %d, in %.1f s; %.2f %% of the units are kept, %.2f %% were ever trained",
                *(self.selections, self.seconds, 100 * shares["kept"], 100 * shares["ever_trained"]),
            )

    def shares(self, pl_module: Any) -> dict[str, float]:
        """Return the shares of the entries that are kept now, and that were trained at any time; empty without
        selectable experts.
        """
        experts = {
            n: layer.expert for n, layer in expert_layers(pl_module.model) if isinstance(layer.expert, Selectable)
        }
        if not experts:
            return {}
        total = sum(expert.units for expert in experts.values())
        kept = sum(expert.support_units().numel() for expert in experts.values())
        touched = sum(self._with_touched(name, expert.support_units()).numel() for name, expert in experts.items())
        return {"kept": kept / total, "ever_trained": touched / total}

    def state_dict(self) -> dict[str, Any]:
        return {
            "selections": self.selections,
            "seconds": self.seconds,
            "last_position": self._last_position,
            "touched": dict(self._touched),
            "stash": dict(self._stash),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.selections, self.seconds = state_dict["selections"], state_dict["seconds"]
        self._last_position = state_dict["last_position"]
        self._touched, self._stash = dict(state_dict["touched"]), dict(state_dict["stash"])

    def _rule(self, expert: Selectable) -> Rule:
        return self.rule or expert.rule

    def _clock(self, trainer: Trainer, module: Any, expert: Selectable) -> tuple[int, int]:
        """Return where training is and after where nothing is selected, in what the rule counts."""
        rule = self._rule(expert)
        micro = isinstance(rule, Reselect) and rule.unit == "micro_batches"
        scale = trainer.accumulate_grad_batches if micro else 1
        position = trainer.fit_loop.epoch_loop.total_batch_idx if micro else trainer.global_step
        return position, rule.last_update(scale * module.length.total_steps, scale * module.length.steps_per_epoch)

    def _is_due(self, expert: Selectable, position: int, last: int) -> bool:
        if position == 0:
            return expert.selects_at_start
        never = self.selections == 0 and position >= last  # short training must not end with everything kept
        return never or self._rule(expert).is_due(position, last)

    def _choose(
        self, trainer: Trainer, module: Any, due: dict[str, Any], position: int, last: int
    ) -> dict[str, Tensor]:
        chosen: dict[str, Tensor] = {}

        def receive(name: str, gradient: Tensor) -> None:
            layer = due[name]
            expert, score = layer.expert, self.score or layer.expert.score
            torch.manual_seed(zlib.crc32(f"{self.seed}/{position}/{name}".encode()))
            gradient = trainer.strategy.reduce(gradient, reduce_op="mean")
            with torch.no_grad():
                scores = expert.unit_scores(score(layer.matrix, gradient, expert.scored_delta(layer.matrix)))
                kept, change = expert.support_units(), expert.unit_change()
                units = self._rule(expert).choose(scores, expert.kept_units, kept, change, position, last)
            chosen[name] = _from_first_rank(units.to(kept.dtype))

        experts = {name: layer.expert for name, layer in due.items()}
        if all(getattr(self.score or expert.score, "needs_gradient", True) for expert in experts.values()):
            torch.manual_seed(zlib.crc32(f"{self.seed}/{position}/{trainer.global_rank}".encode()))  # for dropout
            batches = self._draw(trainer, position)
            with trainer.precision_plugin.forward_context():
                scoring_pass(experts, module.loss, batches, receive, self.accumulator_mib * 2**20)
        else:
            for name, layer in due.items():
                receive(name, torch.zeros((), device=layer.weight.device).expand(layer.matrix.shape))
        return chosen

    def _draw(self, trainer: Trainer, position: int) -> list[Any]:
        """Return this rank's batches for the selection at `position`: an order of their own, the same in every run."""
        source = getattr(trainer, "datamodule", None)
        loader: Any = source.train_dataloader() if source is not None else trainer.train_dataloader
        sampler: Any = getattr(loader, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(1_000_003 * (self.seed + 1) + position)  # beyond the epochs of any training
        batches = list(itertools.islice(iter(loader), self.batches))
        return [trainer.strategy.batch_to_device(batch) for batch in batches]

    def _move(self, trainer: Trainer, name: str, layer: Any, units: Tensor) -> None:
        expert = layer.expert
        before = expert.support_units().clone()
        self._touched[name] = self._with_touched(name, before) if self._last_position > 0 else before[:0]
        values = expert.packed.detach().clone() if expert.packed is not None else None
        slots = expert.reselect(layer.matrix, units)
        if expert.packed is None or values is None:
            return
        for optimizer in trainer.optimizers:
            _carry_moments(optimizer.state.get(expert.packed, {}), expert.packed, slots)
        if self.leavers == "stash":
            self._exchange_with_stash(name, expert, before, values)
            expert.write(layer.matrix)

    def _exchange_with_stash(self, name: str, expert: Any, before: Tensor, values: Tensor) -> None:
        """Put the values of the leavers aside, and give newcomers that were here before theirs back."""
        now = expert.support_units()
        left = ~torch.isin(before, now)
        units, kept = self._stash.get(name, (before[:0], values[:0]))
        units, kept = torch.cat([units, before[left]]), torch.cat([kept, values[left]])
        back = torch.isin(units, now)
        with torch.no_grad():
            expert.packed[torch.searchsorted(now, units[back])] = kept[back]
        self._stash[name] = (units[~back], kept[~back])

    def _with_touched(self, name: str, units: Tensor) -> Tensor:
        earlier = self._touched.get(name)
        return units if earlier is None else torch.unique(torch.cat([earlier.to(units.device), units]))


def _carry_moments(state: dict[str, Any], parameter: Tensor, slots: Tensor) -> None:
    """Move the optimizer's per-entry state to the new slots, in place; newcomers start from zero."""
    stays = slots >= 0
    for value in state.values():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            moved = torch.zeros_like(value)
            moved[stays] = value[slots[stays]]
            value.copy_(moved)


def _from_first_rank(units: Tensor) -> Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast(units, src=0)
    return units
