"""MaskSchedule decides when experts choose the entries that they train, and on which batches."""

import itertools
import logging
import time
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, distributed
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from modular_experts.data.batch import Batch, datamodule_of, loss_terms
from modular_experts.experts.selectable import Selectable
from modular_experts.injection import expert_layers
from modular_experts.library import check_fingerprint, open_experts
from modular_experts.library.record import Record
from modular_experts.masks import Rule, Score
from modular_experts.selection.choice import (
    Layers,
    SupportChoice,
    selectable_layers,
    shared_units,
    statistic_of,
)
from modular_experts.selection.exchange import Exchange, optimizer_bytes
from modular_experts.selection.from_step import StepChoice
from modular_experts.selection.schedule import Schedule, TrainedModule, TrainingLength, seed_of
from modular_experts.selection.scoring import ScoringPass, choose_by_passes
from modular_experts.text import bytes_text

log = logging.getLogger(__name__)


class MaskSchedule(Schedule):
    """Chooses what sparse and masked experts train, before the first step and again at the steps of a rule.

    A second fit of a module goes on with the entries and values of the first, so its first choice is like a choice at a
    later step.

    Args:
        score: Ranks the entries: a class such as `SNIP`, or a function of (weight, gradient, delta). The default is the
            expert type's: `GradientMagnitude` for `SparseExpert`, `ConnectionSensitivity` for `MaskedExpert`.
        rule: When and how the support changes: `SelectOnce`, `Reselect` or `GrowAndDrop`. The default is the expert
            type's: `GrowAndDrop` for `SparseExpert`, `Reselect` in the first epoch for `MaskedExpert`.
        batches: Where the gradient comes from that is scored. `step`: from the training step at which the choice is
            made, over all its micro-batches and ranks. A number: from extra passes over that number of training
            batches, each weighted by its target tokens. A masked expert's score takes passes over four batches.
        seed: Seed of the batches and the random scores of each choice; the run's own (`seed_everything`) if not given.
        accumulator_mib: Memory for sums of gradients over several batches or micro-batches, in MiB. Layers beyond it
            take further passes over all batches; in a training step they choose at its first micro-batch.
        support: An expert whose support is used as it is, without a score, such as an earlier one of the same task.
    """

    def __init__(
        self,
        score: Score | Callable[..., Any] | None = None,  # with a return type, a config could name no function
        rule: Rule | None = None,
        batches: int | Literal["step"] = "step",
        seed: int | None = None,
        accumulator_mib: int = 1024,
        support: str | None = None,
    ) -> None:
        if batches != "step" and batches < 1:
            raise ValueError(f"batches={batches} must be at least 1, or 'step'")
        if support is not None and (score or rule):
            raise ValueError(f"support={support!r} is used as it is: give no score or rule beside it")
        self.score = score
        self.rule = rule
        self.batches = batches
        self.seed = seed
        self.accumulator_mib = accumulator_mib
        self.support = support
        self._start_afresh()

    def _start_afresh(self) -> None:
        self.selections = self.passes = 0
        self.seconds = 0.0
        self._exchange = Exchange()
        # The newest step, or micro-batch, that was asked whether a choice is due.
        self._last_position = -1
        # The choice that the optimizer step at hand makes.
        self._step: StepChoice | None = None
        # Layers that got no gradient when they were due, and the position of that choice.
        self._waiting: tuple[list[str], int] = ([], 0)
        # Weights that an earlier fit trained on supports of their own.
        self._settled: list[str] = []

    @property
    def scoring_batches(self) -> int:
        """How many batches a choice takes that no training step can make."""
        return 4 if self.batches == "step" else self.batches

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._start_afresh()

    def before_optimizers(self, trainer: Trainer, module: TrainedModule) -> bool:
        """Take the support of another expert, which decides how many entries a weight keeps."""
        layers = selectable_layers(module.model)
        if self._last_position >= 0 or self.support is None or not layers:
            return False
        if _settled(layers):
            log.warning("an earlier fit chose what the experts train, so support=%r has no effect", self.support)
            return False
        (other,) = open_experts([self.support])
        check_fingerprint([other], module.fingerprint, module.base)
        # All are read before one is changed, so that an error changes none.
        shared = {name: shared_units(name, layer, other) for name, layer in layers.items()}
        for name, units in shared.items():
            layers[name].expert.resize(layers[name].matrix, units)
        self._last_position = 0
        return True

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast(TrainedModule, pl_module)
        layers = selectable_layers(module.model)
        if self._last_position < 0:
            self._settled = _settled(layers)
        if (self.score or self.rule or self.support) and trainer.is_global_zero and not layers:
            kinds = ", ".join(sorted({type(layer.expert).__name__ for _, layer in expert_layers(module.model)}))
            log.warning("MaskSchedule has no effect: it chooses for sparse and masked experts, and these are %s", kinds)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Choose by passes for the layers that are due and need them; let the others choose in the step that begins."""
        module = cast(TrainedModule, pl_module)
        layers = selectable_layers(module.model)
        if not layers or self.support is not None:
            return
        # All experts of a fit count by the same unit.
        rule = self._rule(next(iter(layers.values())).expert)
        scale = 1
        position = trainer.global_step
        if rule.unit == "micro_batches":
            scale = trainer.accumulate_grad_batches
            position = trainer.fit_loop.epoch_loop.total_batch_idx
        if position == self._last_position:
            # This is a later micro-batch of the same optimizer step.
            self._begin_part(trainer, batch_idx)
            return
        self._last_position = position
        lengths = (scale * module.length.total_steps, scale * module.length.steps_per_epoch)
        ends = trainer.global_step + 1 >= module.length.total_steps
        due = {
            name: layer for name, layer in layers.items() if self._is_due(name, layer.expert, position, lengths, ends)
        }
        in_step = {name: layer for name, layer in due.items() if self._in_step(layer.expert)}
        by_passes = {name: layer for name, layer in due.items() if name not in in_step}
        if by_passes:
            for name, units in self.choose(trainer, module, by_passes, position, lengths).items():
                self._exchange.move(name, due[name], units, trainer.optimizers, position > 0)
        elif in_step:
            # `choose` counts a choice by passes; both together are one selection.
            self.selections += 1
        if not in_step and self._waiting[0]:
            # Layers that an earlier step did not reach choose now, as they would have then.
            names, position = self._waiting
            in_step = {name: layers[name] for name in names}
        if in_step:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            self._step = StepChoice(
                choice=SupportChoice(in_step, position, lengths, self.score, self.rule, seed_of(self.seed, module)),
                parts=batch.get("step_batches", trainer.accumulate_grad_batches),
                budget=self.accumulator_mib * 2**20,
                reduce=partial(trainer.strategy.reduce, reduce_op="mean"),
                agree=partial(_agree, trainer.world_size),
                loss_scale=scaler.get_scale() if scaler is not None and scaler.is_enabled() else None,
            )
            self._begin_part(trainer, batch_idx)

    def _is_due(self, name: str, expert: Selectable, position: int, lengths: tuple[int, int], ends: bool) -> bool:
        """Return whether the expert of a weight chooses at a position; `ends` says that the fit ends with this step."""
        rule = self._rule(expert)
        last = rule.last_update(*lengths)
        if name in self._settled:
            # Its first choice was made in an earlier fit.
            return position > 0 and rule.is_due(position, last)
        # A run that is resumed for fewer steps may begin behind the freeze, and a short one ends before it.
        is_frozen = position >= last if self.selections == 0 else position == last
        if (ends or is_frozen) and expert.support_units().numel() > expert.kept_units:
            # A training must not end with everything kept.
            return True
        if position == 0:
            return expert.selects_at_start
        return rule.is_due(position, last)

    def _in_step(self, expert: Selectable) -> bool:
        """Return whether the next training step can give the statistic that an expert's choice needs."""
        if self.batches != "step" or statistic_of(expert, self.score) == "none":
            return False
        return expert.chooses_in_step and self._rule(expert).unit == "optimizer_steps"

    def _begin_part(self, trainer: Trainer, batch_idx: int) -> None:
        """Tell the choice of this step that a micro-batch begins, and whether the optimizer steps after it."""
        if self._step is not None:
            # Lightning steps at the end of an epoch, however many micro-batches there were.
            ends_epoch = trainer.is_last_batch or batch_idx + 1 >= trainer.num_training_batches
            self._step.next_part(ends_epoch or (batch_idx + 1) % trainer.accumulate_grad_batches == 0)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        if self._step is not None and trainer.world_size > 1:
            self._step.agree_on_reached()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Move experts to the supports that were chosen in this step's backward pass; their gradients are there."""
        if self._step is None:
            return
        step = self._step
        self._step = None
        chosen, waiting = step.finish()
        started = time.perf_counter()
        choice = step.choice
        for name, units in chosen.items():
            self._exchange.move(name, choice.layers[name], units, trainer.optimizers, choice.position > 0, graded=True)
        self._waiting = (waiting, choice.position)
        seconds = step.seconds + time.perf_counter() - started
        self._log_choice(len(chosen), f"at step {trainer.global_step + 1}", seconds)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._step is not None:
            self._step.finish()
            self._step = None
            # The choice that was broken off is due again.
            self._last_position -= 1

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    def choose(
        self, trainer: Trainer, module: TrainedModule, layers: Layers, position: int, lengths: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Return the units that each layer is to keep, the same on every rank; numbers as for `SupportChoice`."""
        started = time.perf_counter()
        seed = seed_of(self.seed, module)
        choice = SupportChoice(layers, position, lengths, self.score, self.rule, seed)
        with torch.random.fork_rng(), trainer.precision_plugin.forward_context():
            # Each rank draws dropout of its own.
            torch.manual_seed(zlib.crc32(f"{seed}/{position}/{trainer.global_rank}".encode()))
            self.passes += choose_by_passes(choice, lambda: self.scoring(trainer, module, position))
        self.selections += 1
        self._log_choice(len(layers), f"before step {trainer.global_step + 1}", time.perf_counter() - started)
        return {name: _agree(trainer.world_size, units) for name, units in sorted(choice.chosen.items())}

    def _log_choice(self, weights: int, when: str, seconds: float) -> None:
        self.seconds += seconds
        log.info("chose what is trained in %d weights %s in %.1f s", weights, when, seconds)

    def scoring(self, trainer: Trainer, module: TrainedModule, position: int) -> ScoringPass:
        """Return a scoring pass over this rank's batches for `position`, the same in every run."""
        source = datamodule_of(trainer)
        loader = cast(DataLoader, trainer.train_dataloader if source is None else source.train_dataloader())
        # A loader of one's own need have no sampler.
        sampler = getattr(loader, "sampler", None)
        if sampler is not None and hasattr(sampler, "set_epoch"):
            # No training comes to an epoch of this number, so the order is used by no epoch.
            sampler.set_epoch(1_000_003 * (seed_of(self.seed, module) + 1) + position)
        drawn = itertools.islice(iter(loader), self.scoring_batches)
        batches: list[Batch] = [trainer.strategy.batch_to_device(batch) for batch in drawn]
        terms = torch.tensor([loss_terms(batch) for batch in batches], device=trainer.strategy.root_device).double()
        terms = trainer.strategy.reduce(terms, reduce_op="mean")
        # A batch counts by its target tokens on all ranks, as in a training step of all these batches.
        shares = (terms / terms.sum().clamp(min=1)).tolist()
        mean_over_ranks = cast(Callable[[Tensor], Tensor], partial(trainer.strategy.reduce, reduce_op="mean"))
        return ScoringPass(module.loss, batches, shares, self.accumulator_mib * 2**20, mean_over_ranks)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        shares = self.shares(cast(TrainedModule, pl_module))
        if not shares:
            return
        times = "once" if self.selections == 1 else f"{self.selections} times"
        text = "chose trainable entries %s (%.1f s): %.2f %% kept, %.2f %% ever trained"
        log.info(text, times, self.seconds, 100 * shares["kept"], 100 * shares["ever_trained"])
        log.info("the optimizer state takes %s", bytes_text(optimizer_bytes(trainer.optimizers)))

    def is_exportable(self, module: TrainedModule) -> bool:
        experts = [layer.expert for layer in selectable_layers(module.model).values()]
        present = sum(expert.support_units().numel() for expert in experts)
        return present <= sum(expert.kept_units for expert in experts)

    def expected_choices(
        self, trainer: Trainer, module: TrainedModule, length: TrainingLength, seconds: float
    ) -> tuple[int, float]:
        kinds = {type(layer.expert): layer.expert for layer in selectable_layers(module.model).values()}
        if not kinds or self.support is not None:
            return 0, 0.0
        # Positions of choices, by whether the steps that were measured had one: a dense start chooses first later.
        at_start: set[int] = set()
        later: set[int] = set()
        for expert in kinds.values():
            rule = self._rule(expert)
            scale = trainer.accumulate_grad_batches if rule.unit == "micro_batches" else 1
            total = scale * length.total_steps
            last = rule.last_update(total, scale * length.steps_per_epoch)
            due = {position for position in range(1, total) if rule.is_due(position, last)}
            if expert.selects_at_start:
                at_start |= {0} | due
            else:
                # A fit that ends before the first update chooses in its last step.
                later |= due or {min(last, total - 1)}
        by_passes = self.scoring_batches * seconds
        measured = round(self.seconds, 3) / self.selections if self.selections else by_passes
        return len(at_start | later), len(at_start) * measured + len(later) * by_passes

    def shares(self, module: TrainedModule) -> dict[str, float]:
        experts = {name: layer.expert for name, layer in selectable_layers(module.model).items()}
        if not experts:
            return {}
        total = sum(expert.units for expert in experts.values())
        kept = sum(expert.support_units().numel() for expert in experts.values())
        touched = sum(self._exchange.ever_trained(name, expert).numel() for name, expert in experts.items())
        return {"kept": kept / total, "ever_trained": touched / total}

    def costs(self, trainer: Trainer, module: TrainedModule) -> dict[str, float]:
        if not selectable_layers(module.model):
            return {}
        counts = {"selections": self.selections, "selection_passes": self.passes}
        return counts | {"selection_seconds": round(self.seconds, 3)}

    def state_dict(self) -> Record:
        # A choice that the step at hand has not made yet is due again.
        last_position = self._last_position if self._step is None else self._last_position - 1
        return {
            "selections": self.selections,
            "seconds": self.seconds,
            "passes": self.passes,
            "last_position": last_position,
            "waiting": self._waiting,
            "settled": self._settled,
            "touched": dict(self._exchange.touched),
        }

    def load_state_dict(self, state_dict: Record) -> None:
        self.selections = state_dict["selections"]
        self.seconds = state_dict["seconds"]
        self.passes = state_dict["passes"]
        self._last_position = state_dict["last_position"]
        # Version 1 had no layers that waited.
        self._waiting = state_dict.get("waiting", self._waiting)[:2]
        self._settled = state_dict.get("settled", [])
        self._exchange.touched = dict(state_dict["touched"])

    def _rule(self, expert: Selectable) -> Rule:
        return self.rule or expert.rule


def _settled(layers: Layers) -> list[str]:
    """Return the weights whose experts have moved, on a support of their own, so not those in a dense start."""
    chosen = {
        name: layer.expert
        for name, layer in layers.items()
        if layer.expert.packed is not None or layer.expert.support_units().numel() < layer.expert.units
    }
    return [name for name, expert in chosen.items() if bool(expert.unit_change().any())]


def _agree(ranks: int, units: Tensor) -> Tensor:
    """Return the units that the first rank chose; equal scores may differ by rounding between ranks."""
    if ranks > 1:
        count = torch.tensor(units.numel(), device=units.device)
        distributed.broadcast(count, src=0)
        units = units if units.numel() == int(count) else units.new_empty(int(count))
        distributed.broadcast(units, src=0)
    return units
