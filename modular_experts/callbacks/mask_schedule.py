"""MaskSchedule chooses the kept entries of selectable experts while they train: when, and on which batches.

`masks` defines scores and rules, `selection/choice.py` makes one choice, and `selection/exchange.py` moves the experts
to it. All ranks score gradients that are averaged over them, so every rank keeps the same entries.
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
from modular_experts.data.batch import IGNORED, Batch
from modular_experts.experts.selectable import Selectable
from modular_experts.injection import expert_layers
from modular_experts.library import StoredExpert, check_base, open_experts
from modular_experts.masks import Rule, Score
from modular_experts.selection.avoid import count_others, open_neighbours, shared_units
from modular_experts.selection.choice import Scope, Selection
from modular_experts.selection.exchange import Exchange, optimizer_bytes
from modular_experts.selection.scoring import Layers, MemoryWatch, ScoringPass, selectable_layers
from modular_experts.text import bytes_text

__all__ = ["MaskSchedule"]

log = logging.getLogger(__name__)


class MaskSchedule(Schedule):
    """Chooses what sparse and masked experts train, before the first step and again at the steps of a rule.

    Args:
        score: Ranks the entries: a class such as `SNIP`, or a function of (weight, gradient, delta). The default
            depends on the expert type: `GradientMagnitude` for `SparseExpert`, the paper's `ConnectionSensitivity` for
            `MaskedExpert`.
        rule: When and how the support changes: `SelectOnce`, `Reselect`, `GrowAndDrop` or `DenseThenSparse`. The
            default depends on the expert type: `GrowAndDrop` for `SparseExpert`, `Reselect` in the first epoch for
            `MaskedExpert`.
        batches: Training batches over which a gradient is averaged before it is scored. Each counts by its target
            tokens, so the way rows are cut into batches does not matter. With one batch, one layer's gradient is held
            at a time; with more, as many as `accumulator_mib` allows.
        leavers: What becomes of the value of an entry that leaves a sparse expert: `revert` forgets it, `stash` keeps
            it, and the entry resumes from it if it comes back. (A masked expert always keeps hidden values.)
        seed: Seed of the batches and the random scores of each choice; the run's own (`seed_everything`) if not given.
        accumulator_mib: Memory for gradient accumulators when `batches` is above 1, in MiB. Layers beyond it go in
            further passes, each of which costs a forward and a backward pass over all batches.
        scope: Within what entries compete: each weight keeps its own share (`layer`), or each transformer block
            (`block`) or all weights together (`global`) keep theirs, wherever in them the scores are highest. How many
            a weight keeps is then decided once, before the optimizer is made (for masked experts, at each choice).
        block_score: A tile's, row's or column's score is the `sum` of its entries' scores, or their Euclidean `norm`.
        avoid: Experts, or libraries of them, whose entries this expert leaves to them, so that supports overlap less.
            Where that was measured, it did not make better merges (`benchmarks/README.md`).
        penalty: Divide the scores by `1 + penalty * experts that keep the entry`. Without it, what the experts to avoid
            keep is excluded.
        support: An expert whose support is used as it is, for example to train several tasks on one support; no score
            is taken then.
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
        self.scope, self.block_score, self.accumulator_mib = scope, block_score, accumulator_mib
        self.avoid = [avoid] if isinstance(avoid, str) else list(avoid or [])
        self.penalty, self.support = penalty, support
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        self.neighbours: list[StoredExpert] = []
        """The opened experts to avoid; known after `setup`."""
        self.selections = self.passes = 0
        self.seconds = 0.0
        self.peak_bytes = 0
        self._exchange = Exchange(leavers)
        self._last_position = -1
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
        """Open the experts to avoid, before anything is loaded."""
        if stage == "fit":
            self.neighbours = open_neighbours(self.avoid)

    def before_optimizers(self, trainer: Trainer, module: TrainedModule) -> None:
        """Choose the first supports here if that decides how many entries a weight keeps."""
        check_base(self.neighbours, module.fingerprint, module.base)
        layers = selectable_layers(module.model)
        if self._last_position >= 0 or not layers:
            return
        packed = {name: layer for name, layer in layers.items() if layer.expert.packed is not None}
        if any(layer.expert.packed.any() for layer in packed.values() if layer.expert.packed is not None):
            # They were trained in an earlier fit, and keep their sizes and values.
            return
        if self.support is not None:
            (other,) = open_experts([self.support])
            check_base([other], module.fingerprint, module.base)
            chosen = {name: shared_units(name, layer, other) for name, layer in layers.items()}
        elif self.scope != "layer" and packed:
            module.model.train().to(trainer.strategy.root_device)
            chosen = self.choose(trainer, module, packed, 0, 1, may_resize=True)
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
        layers = selectable_layers(module.model)
        for expert in (layer.expert for layer in layers.values()):
            partial = expert.support_units().numel() < expert.units and self.selections == 0
            if self._rule(expert).needs_dense_start and (partial or expert.packed is not None):
                raise ValueError(
                    f"rule={type(self.rule).__name__} first trains all entries, and {type(expert).__name__} has "
                    "only some; use MaskedExpert with dense_start"
                )
        if self._listed and trainer.is_global_zero and not layers:
            kinds = ", ".join(sorted({type(layer.expert).__name__ for _, layer in expert_layers(module.model)}))
            log.warning("MaskSchedule has no effect: it chooses for sparse and masked experts, and these are %s", kinds)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Choose at the steps of the rule, on batches drawn for the choice."""
        module = cast(TrainedModule, pl_module)
        layers = selectable_layers(module.model)
        if not layers or self.support is not None:
            return
        rule, scale, position = self._rule(next(iter(layers.values())).expert), 1, trainer.global_step
        if rule.unit == "micro_batches":
            scale, position = trainer.accumulate_grad_batches, trainer.fit_loop.epoch_loop.total_batch_idx
        if position == self._last_position:
            # This is a later micro-batch of the same optimizer step.
            return
        self._last_position = position
        last = rule.last_update(scale * module.length.total_steps, scale * module.length.steps_per_epoch)
        # A short training must not end with everything kept.
        overdue = self.selections == 0 and position >= last
        due = {
            name: layer
            for name, layer in layers.items()
            if (
                layer.expert.selects_at_start
                if position == 0
                else overdue or self._rule(layer.expert).is_due(position, last)
            )
        }
        if due:
            for name, units in self.choose(trainer, module, due, position, last).items():
                rewind = self._rule(due[name].expert).rewind
                self._exchange.move(name, due[name], units, trainer.optimizers, position > 0, rewind)

    def choose(
        self,
        trainer: Trainer,
        module: TrainedModule,
        layers: Layers,
        position: int,
        last: int,
        may_resize: bool = False,
    ) -> dict[str, Tensor]:
        """Return the units that each layer is to keep, by the name of its weight, the same on every rank.

        Args:
            trainer: Reduces over ranks, and has the training data.
            module: Takes the loss.
            layers: The layers to choose for.
            position: The optimizer step about to be taken, or the micro-batch if the rule counts these.
            last: The position after which nothing is chosen.
            may_resize: Whether packed experts may keep another number of units than before.
        """
        selection = Selection(
            self.score, self.rule, self.scope, self.block_score == "norm", self.neighbours, self.penalty, self.seed
        )
        started, memory = time.perf_counter(), MemoryWatch(next(iter(layers.values())).matrix.device)
        with torch.random.fork_rng(), trainer.precision_plugin.forward_context():
            # Each rank draws dropout of its own.
            torch.manual_seed(zlib.crc32(f"{self.seed}/{position}/{trainer.global_rank}".encode()))
            chosen, passes = selection.choose(
                layers, lambda: self.scoring(trainer, module, position), memory, position, last, may_resize
            )
        self.selections += 1
        self.passes += passes
        self.seconds += time.perf_counter() - started
        self.peak_bytes = max(self.peak_bytes, memory.most)
        return {name: _from_first_rank(units) for name, units in sorted(chosen.items())}

    def scoring(self, trainer: Trainer, module: TrainedModule, position: int) -> ScoringPass:
        """Return a scoring pass over this rank's batches for `position`, in an order that is the same in every run."""
        source = getattr(trainer, "datamodule", None)
        loader: Any = source.train_dataloader() if source is not None else trainer.train_dataloader
        if loader is None:
            raise ValueError(
                f"scope={self.scope!r} scores before the dataloaders are there: give the rows as a LightningDataModule"
            )
        sampler: Any = getattr(loader, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            # No training comes to an epoch of this number, so the order is used by no epoch.
            sampler.set_epoch(1_000_003 * (self.seed + 1) + position)
        drawn = itertools.islice(iter(loader), self.batches)
        batches: list[Batch] = [trainer.strategy.batch_to_device(batch) for batch in drawn]
        tokens = torch.stack([(batch["labels"][:, 1:] != IGNORED).sum() for batch in batches]).double()
        tokens = trainer.strategy.reduce(tokens, reduce_op="mean")
        shares = (tokens / tokens.sum().clamp(min=1)).tolist()

        def mean_over_ranks(gradient: Tensor) -> Tensor:
            return cast(Tensor, trainer.strategy.reduce(gradient, reduce_op="mean"))

        return ScoringPass(module.loss, batches, shares, self.accumulator_mib * 2**20, mean_over_ranks)

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
            log.info("%.3f of the %d avoided experts keep a kept entry, on average", overlap, len(self.neighbours))

    def shares(self, module: TrainedModule) -> dict[str, float]:
        """Return the shares of the units that are kept now, and that were trained at any time; empty without
        selectable experts.
        """
        experts = {name: layer.expert for name, layer in selectable_layers(module.model).items()}
        if not experts:
            return {}
        total = sum(expert.units for expert in experts.values())
        kept = sum(expert.support_units().numel() for expert in experts.values())
        touched = sum(self._exchange.ever_trained(name, expert).numel() for name, expert in experts.items())
        return {"kept": kept / total, "ever_trained": touched / total}

    def costs(self, trainer: Trainer, module: TrainedModule) -> dict[str, float]:
        """Return how many choices were made, on how many passes, and what they took; empty without selectable experts.

        `overlap` is how many of the experts to avoid keep an entry that is kept here, on average.
        """
        layers = selectable_layers(module.model)
        if not layers:
            return {}
        found: dict[str, float] = {"selections": self.selections, "selection_passes": self.passes}
        found |= {"selection_seconds": round(self.seconds, 3), "selection_bytes": self.peak_bytes}
        if self.neighbours:
            shared = kept = 0.0
            for name, layer in layers.items():
                units = layer.expert.support_units().long()
                shared += float(count_others(name, layer, self.neighbours)[units].sum())
                kept += units.numel()
            found["overlap"] = shared / max(kept, 1)
        return found

    def state_dict(self) -> dict[str, Any]:
        return {
            "selections": self.selections,
            "seconds": self.seconds,
            "passes": self.passes,
            "peak_bytes": self.peak_bytes,
            "last_position": self._last_position,
            "touched": dict(self._exchange.touched),
            "stash": dict(self._exchange.stash),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.selections, self.seconds = state_dict["selections"], state_dict["seconds"]
        self.passes, self.peak_bytes = state_dict["passes"], state_dict["peak_bytes"]
        self._last_position = state_dict["last_position"]
        self._exchange.touched, self._exchange.stash = dict(state_dict["touched"]), dict(state_dict["stash"])

    def _rule(self, expert: Selectable) -> Rule:
        return self.rule or expert.rule


def _from_first_rank(units: Tensor) -> Tensor:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return units
    count = torch.tensor(units.numel(), device=units.device)
    torch.distributed.broadcast(count, src=0)
    units = units if units.numel() == int(count) else units.new_empty(int(count))
    torch.distributed.broadcast(units, src=0)
    return units
