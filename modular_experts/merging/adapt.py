"""Make an expert of a new task from few labelled rows and a library of experts of other tasks.

The rows are divided into folds, each of which is left out once. Two things are chosen by the loss on rows that were
left out: where training starts, and how many steps it takes. So rows that are learned by heart do not win.
"""

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

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
from modular_experts.library import StoredExpert, as_parents, check_target, open_expert, open_experts, write_expert
from modular_experts.merging.combination import Combination
from modular_experts.merging.gradient_search import descend, first_coefficients
from modular_experts.merging.merged import Merged, write_merged
from modular_experts.merging.objective import Objective
from modular_experts.methods import SparseAverage, TaskArithmetic
from modular_experts.progress import Counted, Progress
from modular_experts.routing.prompts import evaluation_mode
from modular_experts.training.estimate import logging_from
from modular_experts.training.fit import ExpertKind, prepare, quiet, run_fit

log = logging.getLogger(__name__)

COEFFICIENT_STEPS = 10
COEFFICIENT_RATE = 0.1
"""Steps of Adam for the coefficients of the neighbours, and its rate, which falls to 0."""
BATCH = 16
"""The most rows that are measured at once."""
STARTS = ("base", "nearest", "neighbours", "merge")


@dataclass(frozen=True)
class Start:
    """A place where training may start, and what it gave on rows that were left out.

    Attributes:
        name: `base`, `nearest`, `neighbours` or `merge`.
        tokens: The target tokens of each row `(rows,)`.
        losses: The summed loss of each row, while it was left out, `(rows,)`; by the steps of training, from 0.
    """

    name: str
    tokens: Tensor
    losses: dict[int, Tensor] = field(default_factory=dict)

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
        expert: The expert; its delta is the sum of what its start and its training moved.
        starts: All starts by name; the base and the best start of the library have losses after training.
        chosen: The start from which the expert was trained.
        steps: How many steps it was trained.
        weights: The coefficient of each expert in the start, by its directory.
        rows: How many rows were divided into folds.
    """

    expert: StoredExpert
    starts: dict[str, Start]
    chosen: str
    steps: int
    weights: dict[str, float]
    rows: int


def adapt(
    experts: Sequence[str | Path | StoredExpert],
    tasks: Tasks | TaskMixture,
    out: str | Path,
    expert: ExpertKind = SparseExpert,
    modules: str | list[str] = "all-linear",
    steps: int = 32,
    learning_rate: float | None = None,
    folds: int = 3,
    neighbours: int = 4,
    seed: int = 0,
    overwrite: bool = False,
    base: str | None = None,
    dtype: DType = "float32",
    progress: Progress = iter,
) -> Adapted:
    """Train an expert of a new task on few rows, from the best of four starts: the base, or what a library gives.

    These are the nearest expert (the one with the lowest loss on the rows), a weighted sum of the nearest ones (each
    with a coefficient, by gradient on the rows), and the SparseAverage of all. The best of these and the base are
    trained, and the lowest loss on rows that were left out decides between them.

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
    rows = _Rows(tasks if isinstance(tasks, TaskMixture) else TaskMixture(tasks), opened, opened_base)
    parts = divided(len(rows), min(folds, len(rows)), seed)
    settings: dict[str, Any] = {"expert": expert, "modules": modules, "seed": seed}
    settings |= {"learning_rate": learning_rate} if learning_rate else {}
    with tempfile.TemporaryDirectory(prefix="adapt-") as scratch:
        model = opened_base.load(dtype).to(device())  # type: ignore[arg-type]
        starts, placed = _Library(model, rows, opened, neighbours, Path(scratch)).starts(parts, progress)
        # Each training loads a base of its own.
        del model
        train = _Trainings(opened_base, rows, Path(scratch), dtype, settings)
        best = min(STARTS[1:], key=lambda name: starts[name].loss(0))
        marks = sorted({max(1, round(steps * quarter / 4)) for quarter in (1, 2, 3, 4)})
        trainings = [(name, fold) for name in ("base", best) for fold in range(len(parts))]
        for name, fold in progress(Counted(trainings, "trainings")):
            left_out = parts[fold]
            watch = _LeftOut(rows, left_out, marks)
            train(rows.without(left_out), placed[fold][name].beneath, steps, watch)
            for step, losses in watch.losses.items():
                kept = starts[name].losses.setdefault(step, torch.zeros_like(losses))
                kept[left_out] = losses[left_out]
        chosen = min(("base", best), key=lambda name: starts[name].loss(starts[name].best_steps))
        count = starts[chosen].best_steps
        start = placed[-1][chosen]
        if chosen == "base" and count == 0:
            raise ValueError(
                f"neither an expert nor training on these {len(rows)} rows lowers the loss on left-out rows below the "
                f"base's, {starts['base'].loss(0):.4f}; give more rows, or a smaller learning_rate"
            )
        summed = [*start.beneath]
        if count:
            place = Path(scratch, "trained", target.name)
            train(range(len(rows)), start.beneath, count, out=place)
            summed.append(open_expert(place))
        adapted = {"start": chosen, "weights": start.weights, "folds": len(parts), "rows": len(rows), "steps": count}
        record = summed[-1].record
        record = record | {
            "tasks": [rows.task],
            "parents": as_parents([member for member in opened if str(member.place) in start.weights]),
            "hyperparameters": {**(record["hyperparameters"] or {}), "adapted": adapted},
            "scores": {"left_out_loss": starts[chosen].loss(count)},
        }
        write_expert(target, Sum(summed), record, overwrite)
    return Adapted(open_expert(target), starts, chosen, count, start.weights, len(rows))


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


class _Placed(NamedTuple):
    """A start as it is used: the expert below the training, none for the base, and what it consists of."""

    beneath: list[StoredExpert]
    weights: dict[str, float]


class _Library:
    """Makes the starts of a library, from the losses of its experts on the rows."""

    def __init__(
        self, model: PreTrainedModel, rows: _Rows, experts: Sequence[StoredExpert], neighbours: int, scratch: Path
    ) -> None:
        self._model = model
        self._rows = rows
        self._experts = experts
        self._neighbours = neighbours
        self._scratch = scratch
        self._merge = write_merged(Merged(experts, SparseAverage()), scratch / "merge")

    def starts(
        self, folds: Sequence[Sequence[int]], progress: Progress
    ) -> tuple[dict[str, Start], list[dict[str, _Placed]]]:
        """Return what each start gives on left-out rows, and the starts of each fold; the last ones are of all rows."""
        alone, tokens = self._rows.losses(self._model)
        losses = [self._losses_with(member) for member in progress(Counted([*self._experts, self._merge], "experts"))]
        starts = {name: Start(name, tokens, {0: torch.zeros_like(alone)}) for name in STARTS}
        starts["base"].losses[0] += alone
        starts["merge"].losses[0] += losses.pop()
        placed = []
        for left_out in progress(Counted([*folds, []], "folds")):
            learned = self._rows.without(left_out)
            order = sorted(range(len(losses)), key=lambda number: (float(losses[number][learned].sum()), number))
            near = [self._experts[number] for number in order[: self._neighbours]]
            weighted = self._weighted(near, learned)
            if left_out:
                starts["nearest"].losses[0][left_out] = losses[order[0]][left_out]
                starts["neighbours"].losses[0] += self._losses_with(weighted.beneath[0], left_out)
            own = [_Placed([], {}), _Placed(near[:1], {str(near[0].place): 1.0}), weighted, self._average()]
            placed.append(dict(zip(STARTS, own, strict=True)))
        return starts, placed

    def _losses_with(self, expert: StoredExpert, numbers: Sequence[int] | None = None) -> Tensor:
        with applied(self._model, expert, check=False):
            return self._rows.losses(self._model, numbers)[0]

    def _average(self) -> _Placed:
        return _Placed([self._merge], {str(member.place): 1 / len(self._experts) for member in self._experts})

    def _weighted(self, near: Sequence[StoredExpert], numbers: Sequence[int]) -> _Placed:
        """Return the sum of some experts whose coefficients lower the loss on some rows, from 1 for the first."""
        part = self._rows.mixture(numbers, "validation")
        part.eval_batch_size = BATCH
        objective = Objective(self._model, part)
        with Combination(self._model, near) as combination:
            first = first_coefficients(combination, "expert", [1.0])
            how = (COEFFICIENT_RATE, COEFFICIENT_STEPS)
            coefficients, _ = descend(combination, objective, batch_losses, first, *how, decay=True)
        weights = coefficients[0].tolist()
        place = Path(tempfile.mkdtemp(dir=self._scratch), "neighbours")
        merged = write_merged(Merged(near, TaskArithmetic(weights=weights)), place)
        return _Placed([merged], {str(member.place): weight for member, weight in zip(near, weights, strict=True)})


@dataclass(frozen=True)
class _Trainings:
    """Trains experts on top of starts, all with the same settings."""

    base: Base
    rows: _Rows
    scratch: Path
    dtype: DType
    settings: Mapping[str, Any]

    def __call__(
        self,
        numbers: Sequence[int],
        beneath: Sequence[StoredExpert],
        steps: int,
        callback: Callback | None = None,
        out: Path | None = None,
    ) -> None:
        """Train on some rows; what was trained is written alone, without its start."""
        trainer = {"callbacks": [callback] if callback else [], "logger": False, "enable_checkpointing": False}
        trainer |= {"enable_progress_bar": False, "limit_val_batches": 0, "default_root_dir": str(self.scratch)}
        model = {"applied": [str(expert.path) for expert in beneath], "dtype": self.dtype}
        data = self.rows.mixture(numbers, "train")
        # A dozen lines of each training would hide what is measured.
        with quiet(), logging_from(logging.WARNING, "modular_experts"):
            run = prepare(
                "fit", self.base.place, data, out=out, steps=steps, model=model, trainer=trainer, **self.settings
            )
            try:
                run_fit(run)
            finally:
                run.release()
