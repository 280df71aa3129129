"""Make an expert of a new task from few labelled rows and a library of experts of other tasks.

The rows are divided into folds, each of which is left out once. Two things are chosen by the loss on rows that were
left out: where training starts, and how many steps it takes. So rows that are learned by heart do not win.
"""

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from transformers import PreTrainedModel

from modular_experts.base import Base, DType
from modular_experts.base.apply import applied
from modular_experts.base.device import device
from modular_experts.data import TaskMixture
from modular_experts.data.batch import Collator
from modular_experts.data.tasks import Tasks
from modular_experts.deltas import Sum
from modular_experts.evaluation import batch_losses
from modular_experts.experts import SparseExpert
from modular_experts.injection.task_heads import head_state
from modular_experts.language_model import is_classifier
from modular_experts.library import StoredExpert, as_parents, check_target, open_expert, open_experts, write_expert
from modular_experts.library.record import Facts, Record
from modular_experts.merging.combination import Combination
from modular_experts.merging.gradient_search import descend, first_coefficients
from modular_experts.merging.merged import Merged, write_merged
from modular_experts.merging.objective import Objective
from modular_experts.methods import TaskArithmetic
from modular_experts.progress import Counted, Progress
from modular_experts.routing.prompts import evaluation_mode
from modular_experts.training.estimate import logging_from
from modular_experts.training.fit import ExpertKind, FitSettings, fit

log = logging.getLogger(__name__)

COEFFICIENT_STEPS = 10
COEFFICIENT_RATE = 0.1
"""Steps of Adam for the coefficients of the neighbours, and its rate, which falls to 0."""
BATCH = 16
"""The most rows that are measured at once."""
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}


@dataclass(frozen=True)
class Start:
    """A place where training may start, and what it gave on rows that were left out.

    Attributes:
        tokens: The target tokens of each row `(rows,)`.
        losses: The summed loss of each row, while it was left out, `(rows,)`; by the steps of training, from 0.
    """

    tokens: Tensor
    losses: dict[int, Tensor]

    def loss(self, steps: int) -> float:
        """Return the loss on left-out rows after some steps, in nats a target token."""
        return float(self.losses[steps].sum() / self.tokens.sum())

    @property
    def best_steps(self) -> int:
        """The number of steps with the lowest loss on left-out rows."""
        return min(self.losses, key=lambda steps: (self.loss(steps), steps))


@dataclass(frozen=True)
class Adapted:
    """What `adapt` measured, chose and wrote.

    Attributes:
        expert: The expert; its delta is the sum of the deltas of its start and its training.
        starts: The two starts, `base` and `neighbours`.
        chosen: The start from which the expert was trained.
        steps: How many steps it was trained.
        weights: The coefficient of each expert in the start, by its directory.
        rows: How many rows were divided into folds.
        alone: The loss of each expert of the library on all rows, by its directory, in nats a target token.
    """

    expert: StoredExpert
    starts: dict[str, Start]
    chosen: str
    steps: int
    weights: dict[str, float]
    rows: int
    alone: dict[str, float]


def adapt(
    experts: Sequence[str | Path | StoredExpert],
    tasks: Tasks | TaskMixture,
    out: str | Path,
    expert: ExpertKind = SparseExpert,
    modules: str | list[str] = "all-linear",
    steps: int = 16,
    learning_rate: float | None = None,
    folds: int = 3,
    neighbours: int = 4,
    seed: int = 0,
    overwrite: bool = False,
    base: str | None = None,
    dtype: DType = "float32",
    progress: Progress = iter,
) -> Adapted:
    """Train an expert of a new task on few rows, from the base or from a weighted sum of experts of other tasks.

    The nearest experts have the lowest losses on the rows. Gradient descent on the rows finds a coefficient for each,
    from 1 for the nearest and 0 for the others. Both starts are trained; the lowest loss on rows that were left out
    decides between them.

    Args:
        experts: Experts of other tasks.
        tasks: The new task. Its training and validation rows are divided into folds; its test rows are not read.
        out: Directory of the expert, which holds start and training in one delta.
        expert: The type of expert that is trained on top of the start.
        modules: The layers that it trains.
        steps: The most steps of training; the folds choose 0, a quarter, a half, three quarters or all of them.
        learning_rate: Peak rate; the type's own if not given.
        folds: How many parts of the rows are left out in turn, from 2 to 4.
        neighbours: How many of the nearest experts get a coefficient.
        seed: Seed of the folds and of the trainings.
        overwrite: Replace an expert.
        base: The base's directory or hub id; the one in the experts' records by default.
        dtype: Data type of the base.
        progress: Wraps experts, folds and trainings.

    Raises:
        FileExistsError: `out` exists; nothing has been read.
        ValueError: There are fewer than two rows, or several tasks, or a held-out one; the experts' bases differ; or
            neither a start nor training lowers the loss on left-out rows below the base's.
    """
    target = check_target(out, overwrite)
    if not 2 <= folds <= 4:
        raise ValueError(f"folds={folds} must be from 2 to 4")
    if min(steps, neighbours) < 1:
        raise ValueError(f"steps={steps} and neighbours={neighbours} must be at least 1")
    opened = open_experts(experts, base=base)
    opened_base = Base.open(base, opened)
    if is_classifier(opened_base.structure.model):
        raise ValueError(
            f"{opened_base.place} classifies by task heads, and no expert has one for a new task; train one with fit"
        )
    rows = _Rows(tasks if isinstance(tasks, TaskMixture) else TaskMixture(tasks), opened, opened_base)
    parts = divided(len(rows), min(folds, len(rows)), seed)
    settings: FitSettings = {"seed": seed}
    if learning_rate is not None:
        settings["learning_rate"] = learning_rate
    with tempfile.TemporaryDirectory(prefix="adapt-") as scratch:
        place = Path(scratch)
        before = _before_training(opened, opened_base.load(dtype), rows, parts, neighbours, place, progress)
        train = _Trainings(opened_base, rows, place, dtype, expert, modules, settings)
        sums_of_folds: dict[str, list[StoredExpert | None]] = {
            "base": [None for _ in parts],
            "neighbours": [near.sum for near in before.neighbours],
        }
        starts = {}
        for name, sums in sums_of_folds.items():
            trained = _losses_after_training(train, rows, parts, sums, steps, progress)
            starts[name] = Start(before.tokens, {0: before.losses[name]} | trained)
        chosen = min(starts, key=lambda name: starts[name].loss(starts[name].best_steps))
        count = starts[chosen].best_steps
        if chosen == "base" and count == 0:
            raise ValueError(
                f"neither an expert nor training on these {len(rows)} rows lowers the loss on left-out rows below the "
                f"base's, {starts['base'].loss(0):.4f}; give more rows, or a smaller learning_rate"
            )
        start, weights = before.of_all_rows if chosen == "neighbours" else (None, {})
        summed = [start] if start else []
        if count:
            train(range(len(rows)), start, count, out=place / "trained" / target.name)
            summed.append(open_expert(place / "trained" / target.name))
        adapted = {"start": chosen, "weights": weights, "folds": len(parts), "rows": len(rows), "steps": count}
        record = _record_of(summed[-1], adapted, rows.task, starts[chosen].loss(count), opened)
        write_expert(target, Sum(summed), record, overwrite, state=head_state(summed[-1:]))
    return Adapted(open_expert(target), starts, chosen, count, weights, len(rows), before.alone)


class _Neighbours(NamedTuple):
    """A weighted sum of experts, and the coefficient of each by its directory."""

    sum: StoredExpert
    weights: dict[str, float]


class _BeforeTraining(NamedTuple):
    """The target tokens of each row, and losses before any training.

    `losses` has the loss of each row, while it was left out, by the start; `neighbours` a sum for each fold.
    """

    tokens: Tensor
    losses: dict[str, Tensor]
    neighbours: list[_Neighbours]
    of_all_rows: _Neighbours
    alone: dict[str, float]


def _before_training(
    experts: Sequence[StoredExpert],
    model: PreTrainedModel,
    rows: "_Rows",
    parts: Sequence[Sequence[int]],
    neighbours: int,
    out: Path,
    progress: Progress,
) -> _BeforeTraining:
    """Measure the base, each expert, and for each fold the weighted sum of the nearest experts."""
    model.to(device())  # type: ignore[arg-type]
    of_base, tokens = rows.losses(model)
    of_experts: list[Tensor] = []
    for expert in progress(Counted(experts, "experts")):
        with applied(model, expert, check=False):
            of_experts.append(rows.losses(model)[0])

    def weighted(learned: Sequence[int], name: str) -> _Neighbours:
        order = sorted(range(len(experts)), key=lambda expert: float(of_experts[expert][learned].sum()))
        nearest = [experts[expert] for expert in order[:neighbours]]
        return _weighted(model, rows, learned, nearest, out / name)

    of_sums = torch.zeros_like(of_base)
    near: list[_Neighbours] = []
    for left_out in progress(Counted(parts, "folds")):
        near.append(weighted(rows.without(left_out), f"neighbours-{len(near)}"))
        with applied(model, near[-1].sum, check=False):
            of_sums += rows.losses(model, left_out)[0]
    of_all = weighted(rows.without([]), "neighbours")
    alone = {str(own.place): float(of.sum() / tokens.sum()) for own, of in zip(experts, of_experts, strict=True)}
    return _BeforeTraining(tokens, {"base": of_base, "neighbours": of_sums}, near, of_all, alone)


def _losses_after_training(
    train: "_Trainings",
    rows: "_Rows",
    parts: Sequence[Sequence[int]],
    starts: Sequence[StoredExpert | None],
    steps: int,
    progress: Progress,
) -> dict[int, Tensor]:
    """Train from the start of each fold, and return the loss of each left-out row by the steps of training."""
    marks = sorted({max(1, round(steps * quarter / 4)) for quarter in (1, 2, 3, 4)})
    losses = {mark: torch.zeros(len(rows), dtype=torch.float64) for mark in marks}
    for left_out, start in progress(Counted(list(zip(parts, starts, strict=True)), "trainings")):
        watch = _LeftOut(rows, left_out, marks)
        train(rows.without(left_out), start, steps, [watch])
        for mark in marks:
            losses[mark] += watch.losses[mark]
    return losses


def _record_of(last: StoredExpert, adapted: Facts, task: str, loss: float, experts: Sequence[StoredExpert]) -> Record:
    """Return the record of the training, or of the start where nothing was trained, and add the choices."""
    return last.record | {
        "tasks": [task],
        "parents": as_parents([member for member in experts if str(member.place) in adapted["weights"]]),
        "hyperparameters": {**(last.record["hyperparameters"] or {}), "adapted": adapted},
        "scores": {"left_out_loss": loss},
    }


def divided(count: int, folds: int, seed: int) -> list[list[int]]:
    """Divide the numbers of some rows into folds of nearly equal size; the seed draws them."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return [sorted(order[fold::folds]) for fold in range(folds)]


class _Rows:
    """The labelled rows of the new task."""

    def __init__(self, data: TaskMixture, experts: Sequence[StoredExpert], base: Base) -> None:
        if len(data.roles) != 1:
            raise ValueError(f"adapt makes an expert of one task, and {len(data.roles)} are given; name one of them")
        ((self.task, role),) = data.roles.items()
        if role == "held_out":
            raise ValueError(f"{self.task}: rows of a held-out task are kept for the test; give the task as held_in")
        if data.shots:
            raise ValueError(
                f"adapt trains on few rows, and shots={data.shots} would show them to each other; leave it out"
            )
        self._data = data
        data.read_for(base)
        self._rows = [*data.rows("train")[self.task], *data.rows("validation")[self.task]]
        if len(self) < 2:
            counted = f"{len(self)} labelled row" + ("" if len(self) == 1 else "s")
            raise ValueError(f"task {self.task!r} has {counted} outside of its test, and folds need 2; label more")
        if known := [str(expert.place) for expert in experts if self.task in expert.record["tasks"]]:
            places = " and ".join(known)
            log.warning(
                "%s was trained on %s itself, perhaps on these rows: its loss may be too low", places, self.task
            )

    def __len__(self) -> int:
        return len(self._rows)

    def without(self, left_out: Sequence[int]) -> list[int]:
        """Return the numbers of the other rows."""
        return [number for number in range(len(self)) if number not in left_out]

    def mixture(self, numbers: Sequence[int], split: str) -> TaskMixture:
        """Return the mixture of some rows, all in one split."""
        return self._data.of_rows({self.task: [replace(self._rows[number], split=split) for number in numbers]})

    @torch.no_grad()
    def losses(self, model: PreTrainedModel, numbers: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Return the summed loss of each row, and its target tokens, in float64 `(rows,)`; 0 for rows not asked for."""
        asked = list(range(len(self)) if numbers is None else numbers)
        (examples,) = self.mixture(asked, "validation").examples("validation").values()
        collate = Collator(self._data.row_tokenizer().pad_id, texts=False)
        found = torch.zeros(2, len(self), dtype=torch.float64)
        with evaluation_mode(model):
            for first in range(0, len(asked), BATCH):
                batch = move_data_to_device(collate(examples[first : first + BATCH]), model.device)
                found[:, asked[first : first + BATCH]] = torch.stack(batch_losses(model, batch)).double().cpu()
        return found[0], found[1]


class _LeftOut(Callback):
    """Keeps the losses of rows that were left out, at some steps of a training."""

    def __init__(self, rows: _Rows, left_out: Sequence[int], marks: Sequence[int]) -> None:
        self._rows = rows
        self._left_out = left_out
        self._marks = marks
        self.losses: dict[int, Tensor] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: object) -> None:
        step = trainer.global_step
        if step in self._marks and step not in self.losses:
            self.losses[step], _ = self._rows.losses(pl_module.model, self._left_out)  # type: ignore[arg-type]


def _weighted(
    model: PreTrainedModel, rows: _Rows, numbers: Sequence[int], experts: Sequence[StoredExpert], out: Path
) -> _Neighbours:
    """Write the sum of some experts whose coefficients lower the loss on some rows, from 1 for the first."""
    part = rows.mixture(numbers, "validation")
    part.eval_batch_size = BATCH
    with Combination(model, experts) as combination:
        first = first_coefficients(combination, "expert", [1.0])
        how = (COEFFICIENT_RATE, COEFFICIENT_STEPS)
        coefficients, _ = descend(combination, Objective(model, part), batch_losses, first, *how, decay=True)
    weights = coefficients[0].tolist()
    written = write_merged(Merged(experts, TaskArithmetic(weights=weights)), out)
    return _Neighbours(written, {str(own.place): weight for own, weight in zip(experts, weights, strict=True)})


@dataclass(frozen=True)
class _Trainings:
    """Trains experts on top of starts, all with the same settings."""

    base: Base
    rows: _Rows
    scratch: Path
    dtype: DType
    kind: ExpertKind
    modules: str | list[str]
    settings: FitSettings

    def __call__(
        self,
        numbers: Sequence[int],
        beneath: StoredExpert | None,
        steps: int,
        callbacks: Sequence[Callback] = (),
        out: Path | None = None,
    ) -> None:
        """Train on some rows, on top of an expert; what was trained is written without it."""
        trainer = QUIET | {"callbacks": list(callbacks), "default_root_dir": str(self.scratch)}
        model = {"applied": [str(beneath.path)] if beneath else [], "dtype": self.dtype}
        how: FitSettings = {**self.settings, "steps": steps, "model": model, "trainer": trainer}
        # A dozen lines of each training would hide what is measured.
        with logging_from(logging.WARNING, "modular_experts"):
            fit(self.base.place, self.rows.mixture(numbers, "train"), self.kind, self.modules, out, **how)
