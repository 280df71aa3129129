"""MaskSchedule: when the kept entries of selectable experts are chosen, on which batches, and what becomes of those
that leave.

Which entries a score prefers, and how a new support follows from the old, is said in `masks`; how one choice is made,
in `selection`. Scores are taken in optimizer steps from gradients averaged over all ranks, so every rank keeps the same
entries.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
import zlib
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from modular_experts.callbacks.schedule import Schedule, TrainedModule
from modular_experts.data.batch import IGNORED
from modular_experts.experts.selectable import Selectable
from modular_experts.injection import expert_layers
from modular_experts.library import StoredExpert, check_base, open_experts
from modular_experts.masks import Rule, Score
from modular_experts.selection.avoid import count_others, open_neighbours, shared_units
from modular_experts.selection.choice import Scope, Selection
from modular_experts.selection.optimizer_state import carry_state, forget_state, optimizer_bytes
from modular_experts.selection.scoring import MemoryWatch, ScoringPass
from modular_experts.text import bytes_text

__all__ = ["MaskSchedule"]

log = logging.getLogger(__name__)


class MaskSchedule(Schedule):
    """Chooses what sparse and masked experts train: before the first step, and again as the rule says.

    Args:
        score: Ranks the entries: a class such as `SNIP`, or a function of (weight, gradient, delta). Each expert type
            has a default: `GradientMagnitude` for `SparseExpert`, the paper's `ConnectionSensitivity` for
            `MaskedExpert`.
        rule: When and how the support changes: `SelectOnce`, `Reselect`, `GrowAndDrop` or `DenseThenSparse`. Each
            expert type has a default: `GrowAndDrop` for `SparseExpert`, `Reselect` in the first epoch for
            `MaskedExpert`.
        batches: Training batches over which a gradient is averaged before it is scored; each counts by its target
            tokens, so it does not matter how rows are cut into batches. With one, one layer's gradient is held at a
            time; with more, as many as `accumulator_mib` allows.
        leavers: What becomes of the value of an entry that leaves a sparse expert: `revert` forgets it, `stash` keeps
            it aside, and the entry resumes from it if it comes back. (A masked expert always hides, never forgets.)
        seed: Seeds the batches and the random scores of each selection; the run's own (`seed_everything`) if none is
            given.
        accumulator_mib: Memory for gradient accumulators when `batches` is above 1, in MiB; layers beyond it go in
            further passes, each of which costs a forward and a backward pass over all batches.
        scope: Within what entries compete: each weight keeps its own share (`layer`), or each transformer block
            (`block`) or all weights together (`global`) keep theirs, wherever in them the scores are highest. How many
            a weight keeps is then decided once, before the optimizer is made (for masked experts, at each selection).
        block_score: A tile's, row's or column's score is the `sum` of its entries' scores, or their Euclidean `norm`.
        avoid: Experts, or libraries of them, whose entries this one is to leave to them, so that supports overlap less.
            Where that was measured, it did not make better merges (`benchmarks/README.md`).
        penalty: Divide the scores by `1 + penalty * experts that keep the entry`; without it, what the experts to
            avoid keep is excluded.
        support: An expert whose support is used as it is, for example to train several tasks on one support; nothing
            is scored then.
    """

    def __init__(
        self,
        score: Score | Callable[..., Any] | None = None,
        rule: Rule | None = None,
        batches: int = 4,
        leavers: Literal["revert", "stash"] = "revert",
        seed: int | None = None,
        accumulator_mib: int = 1024,
        scope: Scope = "layer",
        block_score: Literal["sum", "norm"] = "sum",
        avoid: list[str] | str | None = None,
        penalty: float | None = None,
        support: str | None = None,
    ) -> None:
        if batches < 1:
            raise ValueError(f"batches={batches} must be at least 1: a score needs a gradient")
        if penalty is not None and penalty <= 0:
            raise ValueError(f"penalty={penalty} must be above 0; leave it out to exclude what others keep")
        if penalty is not None and not avoid:
            raise ValueError(f"penalty={penalty} has no effect without experts to avoid; name some in avoid")
        if support is not None and (score or rule or avoid or scope != "layer"):
            raise ValueError(f"support={support!r} is used as it is: give no score, rule, scope or avoid beside it")
        self.score, self.rule, self.batches = score, rule, batches
        self.leavers, self.accumulator_mib = leavers, accumulator_mib
        self.scope, self.block_score = scope, block_score
        self.avoid = [avoid] if isinstance(avoid, str) else list(avoid or [])
        self.penalty, self.support = penalty, support
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        self.selections = self.passes = 0
        self.seconds = 0.0
        self.peak_bytes = 0
        self._last_position = -1
        self._touched: dict[str, Tensor] = {}
        self._stash: dict[str, tuple[Tensor, Tensor]] = {}
        self._others: list[StoredExpert] = []

        self._listed = True

    @classmethod
    def default(cls) -> MaskSchedule:
        """Return the schedule that a module adds by itself: it is silent where there is nothing to choose."""
        schedule = cls()
        schedule._listed = False
        return schedule

    @property
    def resizes(self) -> bool:
        """Whether weights compete for what is kept, or another expert gives the support."""
        return self.scope != "layer" or self.support is not None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the experts to avoid, before anything is loaded."""
        if stage == "fit":
            self._others = open_neighbours(self.avoid)

    def before_optimizers(self, trainer: Trainer, module: TrainedModule) -> None:
        """Choose the first supports here if that decides how many entries a weight keeps.

        Lightning does not say yet whether a checkpoint follows; if so, its supports replace these.
        """
        check_base(self._others, module.fingerprint, module.base)
        layers = _selectable(module)
        if self._last_position >= 0 or not layers:
            return
        packed = {name: layer for name, layer in layers.items() if layer.expert.packed is not None}
        if any(layer.expert.packed.any() for layer in packed.values()):
            return  # trained in an earlier fit: they keep their sizes, and what they have learnt
        if self.support is not None:
            (other,) = open_experts([self.support])
            check_base([other], module.fingerprint, module.base)
            chosen = {name: shared_units(name, layer, other) for name, layer in layers.items()}
        elif self.scope != "layer" and packed:
            module.model.train().to(trainer.strategy.root_device)
            chosen = self._choose(trainer, module, packed, 0, 1, may_resize=True)
        else:
            return
        for name, units in chosen.items():
            layers[name].expert.resize(layers[name].matrix, units)
        self._last_position = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn where a schedule that somebody listed has nothing to choose.

        Raises:
            ValueError: The rule needs a dense start, and the experts are sparse from the first step.
        """
        module = cast(TrainedModule, pl_module)
        for layer in _selectable(module).values():
            partial = layer.expert.support_units().numel() < layer.expert.units and self.selections == 0
            if self._rule(layer.expert).needs_dense_start and (partial or layer.expert.packed is not None):
                raise ValueError(
                    f"rule={type(self.rule).__name__} first trains all entries, and {type(layer.expert).__name__} has "
                    "only some; use MaskedExpert with dense_start"
                )
        experts = [layer.expert for _, layer in expert_layers(module.model)]
        if self._listed and trainer.is_global_zero and not any(isinstance(e, Selectable) for e in experts):
            kinds = ", ".join(sorted({type(expert).__name__ for expert in experts}))
            log.warning("MaskSchedule has no effect: it chooses for sparse and masked experts, and these are %s", kinds)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Select where the rule says so; the score sees batches of its own, not the one about to be trained on."""
        module = cast(TrainedModule, pl_module)
        layers = _selectable(module)
        if not layers or self.support is not None:
            return
        position, last = self._clock(trainer, module, next(iter(layers.values())).expert)
        if position == self._last_position:
            return  # a later micro-batch of the same optimizer step
        self._last_position = position
        due = {name: layer for name, layer in layers.items() if self._is_due(layer.expert, position, last)}
        if due:
            for name, units in self._choose(trainer, module, due, position, last).items():
                self._move(trainer, name, due[name], units)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what is kept, what was trained at any time, and what choosing it cost."""
        module = cast(TrainedModule, pl_module)
        shares = self.shares(module)
        if not shares:
            return
        log.info(
            "chose trainable entries %d times (%.1f s): %.2f %% kept, %.2f %% ever trained",
            *(self.selections, self.seconds, 100 * shares["kept"], 100 * shares["ever_trained"]),
        )
        more = f"; a choice took up to {bytes_text(self.peak_bytes)} more memory" if self.peak_bytes else ""
        log.info("the optimizer state takes %s%s", bytes_text(optimizer_bytes(trainer.optimizers)), more)
        overlap = self.costs(trainer, module).get("overlap")
        if overlap is not None:
            log.info("a kept entry is also kept by %.3f of %d avoided experts on average", overlap, len(self._others))

    def costs(self, trainer: Trainer, module: TrainedModule) -> dict[str, float]:
        """Return how many choices were made, on how many passes, and what they took; empty without selectable experts.

        `overlap` is how many of the experts to avoid keep an entry that is kept here, on average.
        """
        layers = _selectable(module)
        if not layers:
            return {}
        found: dict[str, float] = {"selections": self.selections, "selection_passes": self.passes}
        found |= {"selection_seconds": round(self.seconds, 3), "selection_bytes": self.peak_bytes}
        if self._others:
            shared = kept = 0.0
            for name, layer in layers.items():
                units = layer.expert.support_units().long()
                shared += float(count_others(name, layer, self._others)[units].sum())
                kept += units.numel()
            found["overlap"] = shared / max(kept, 1)
        return found

    def shares(self, module: TrainedModule) -> dict[str, float]:
        """Return the shares of the entries that are kept now, and that were trained at any time; empty without
        selectable experts.
        """
        experts = {name: layer.expert for name, layer in _selectable(module).items()}
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
            "passes": self.passes,
            "peak_bytes": self.peak_bytes,
            "last_position": self._last_position,
            "touched": dict(self._touched),
            "stash": dict(self._stash),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.selections, self.seconds = state_dict["selections"], state_dict["seconds"]
        self.passes, self.peak_bytes = state_dict["passes"], state_dict["peak_bytes"]
        self._last_position = state_dict["last_position"]
        self._touched, self._stash = dict(state_dict["touched"]), dict(state_dict["stash"])

    def _rule(self, expert: Selectable) -> Rule:
        return self.rule or expert.rule

    def _clock(self, trainer: Trainer, module: TrainedModule, expert: Selectable) -> tuple[int, int]:
        """Return the position of the training, and the last one at which anything is chosen, in the rule's unit."""
        rule = self._rule(expert)
        micro = rule.unit == "micro_batches"
        scale = trainer.accumulate_grad_batches if micro else 1
        position = trainer.fit_loop.epoch_loop.total_batch_idx if micro else trainer.global_step
        return position, rule.last_update(scale * module.length.total_steps, scale * module.length.steps_per_epoch)

    def _is_due(self, expert: Selectable, position: int, last: int) -> bool:
        if position == 0:
            return expert.selects_at_start
        never = self.selections == 0 and position >= last  # short training must not end with everything kept
        return never or self._rule(expert).is_due(position, last)

    def _choose(
        self,
        trainer: Trainer,
        module: TrainedModule,
        due: dict[str, Any],
        position: int,
        last: int,
        may_resize: bool = False,
    ) -> dict[str, Tensor]:
        """Return the units that the layers are to keep, the same on every rank."""
        started, memory = time.perf_counter(), MemoryWatch(next(iter(due.values())).matrix.device)
        norm = self.block_score == "norm"
        kind = Selection(
            score=self.score,
            rule=self.rule,
            scope=self.scope,
            norm=norm,
            others=self._others,
            penalty=self.penalty,
            position=position,
            last=last,
            seed=self.seed,
            may_resize=may_resize,
        )
        with torch.random.fork_rng(), trainer.precision_plugin.forward_context():
            torch.manual_seed(zlib.crc32(f"{self.seed}/{position}/{trainer.global_rank}".encode()))  # for dropout
            self.passes += kind.make(due, lambda: self._scoring(trainer, module, position), memory)
        self.selections += 1
        self.seconds += time.perf_counter() - started
        self.peak_bytes = max(self.peak_bytes, memory.most)
        return {name: _from_first_rank(units) for name, units in sorted(kind.chosen.items())}

    def _scoring(self, trainer: Trainer, module: TrainedModule, position: int) -> ScoringPass:
        batches = self._draw(trainer, position)
        tokens = torch.stack([(batch["labels"][:, 1:] != IGNORED).sum() for batch in batches]).double()
        tokens = trainer.strategy.reduce(tokens, reduce_op="mean")
        shares = (tokens / tokens.sum().clamp(min=1)).tolist()
        budget = self.accumulator_mib * 2**20
        return ScoringPass(
            module.loss, batches, shares, budget, lambda gradient: trainer.strategy.reduce(gradient, reduce_op="mean")
        )

    def _draw(self, trainer: Trainer, position: int) -> list[Any]:
        """Return this rank's batches for the selection at `position`: an order of their own, the same in every run."""
        source = getattr(trainer, "datamodule", None)
        loader: Any = source.train_dataloader() if source is not None else trainer.train_dataloader
        if loader is None:
            raise ValueError(
                f"scope={self.scope!r} scores before the dataloaders are there: give the rows as a LightningDataModule"
            )
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
        if self._rule(expert).rewind:
            expert.rewind(layer.matrix)
            forget_state(trainer.optimizers, expert.parameters())
        if expert.packed is None or values is None:
            return
        for optimizer in trainer.optimizers:
            carry_state(optimizer.state.get(expert.packed, {}), expert.packed, slots)
        if self.leavers == "stash":
            self._exchange_with_stash(name, expert, before, values)
            expert.write(layer.matrix)

    def _exchange_with_stash(self, name: str, expert: Any, before: Tensor, values: Tensor) -> None:
        """Put the values of the leavers aside, and give newcomers that were here before theirs back."""
        now = expert.support_units()
        left = ~torch.isin(before, now)
        units, kept = self._stash.get(name, (before[:0], values[:0]))
        units, kept = units.to(before.device), kept.to(values.device)  # a resumed run's come from the CPU
        units, kept = torch.cat([units, before[left]]), torch.cat([kept, values[left]])
        back = torch.isin(units, now)
        with torch.no_grad():
            expert.packed[torch.searchsorted(now, units[back])] = kept[back]
        self._stash[name] = (units[~back], kept[~back])

    def _with_touched(self, name: str, units: Tensor) -> Tensor:
        earlier = self._touched.get(name)
        return units if earlier is None else torch.unique(torch.cat([earlier.to(units.device), units]))


def _selectable(module: TrainedModule) -> dict[str, Any]:
    """Return the layers whose support is chosen, by the names of their weights."""
    return {name: layer for name, layer in expert_layers(module.model) if isinstance(layer.expert, Selectable)}


def _from_first_rank(units: Tensor) -> Tensor:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return units
    count = torch.tensor(units.numel(), device=units.device)
    torch.distributed.broadcast(count, src=0)
    units = units if units.numel() == int(count) else units.new_empty(int(count))
    torch.distributed.broadcast(units, src=0)
    return units
