"""Make an expert of a new task from few labelled rows and a library of experts of other tasks.

Folds of the rows choose: where training starts, and how many of its steps count. Each choice looks only at the loss on
rows that neither the start nor the training has seen, so rows learned by heart do not win.
"""

import inspect
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from modular_experts.base import Base, DType
from modular_experts.base.apply import applied
from modular_experts.data import TaskMixture
from modular_experts.data.batch import Batch, Collator
from modular_experts.data.rows import Row
from modular_experts.data.tasks import Tasks
from modular_experts.deltas import Delta
from modular_experts.evaluation import batch_losses
from modular_experts.experts import Expert, SparseExpert
from modular_experts.library import StoredExpert, as_parents, check_target, open_expert, open_experts, write_expert
from modular_experts.library.described import find_class
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


@dataclass(frozen=True)
class Start:
    """A place where training may start, and what it gave on left-out rows.

    Attributes:
        name: `base`, `nearest`, `neighbours` or `merge`.
        losses: The summed loss of each row that was left out `(rows,)`, by the steps trained; 0 steps is the start.
        tokens: The target tokens of each row `(rows,)`.
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
        expert: The expert, which stands alone.
        starts: All starts; the base and the best start of the library have losses after training.
        chosen: The start from which the expert was trained.
        steps: How many steps it was trained.
        weights: The coefficient of each expert in the start, by name.
    """

    expert: StoredExpert
    starts: dict[str, Start]
    chosen: str
    steps: int
    weights: dict[str, float]

    @property
    def helped(self) -> bool:
        """Whether an expert of the library helped with the task."""
        return self.chosen != "base"


class _Part(NamedTuple):
    """The numbers of the rows that learn, and of those that are left out."""

    learned: list[int]
    left_out: list[int]


class _Measured:
    """The rows of a task in batches, in their order."""

    def __init__(self, data: TaskMixture, rows: Sequence[Row], device: torch.device) -> None:
        (examples,) = _mixture_of(data, rows, "validation").examples("validation").values()
        collate = Collator(data.row_tokenizer().pad_id, texts=False)
        parts = [collate(examples[first : first + BATCH]) for first in range(0, len(examples), BATCH)]
        self._batches: list[Batch] = []
        for part in parts:
            self._batches.append({name: v.to(device) if isinstance(v, Tensor) else v for name, v in part.items()})

    @torch.no_grad()
    def losses(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Return each row's summed loss, and its number of target tokens, as float64 on the CPU."""
        with evaluation_mode(model):
            measured = [batch_losses(model, batch) for batch in self._batches]
        sums, counts = (torch.cat(parts).double().cpu() for parts in zip(*measured, strict=True))
        return sums, counts


class _LeftOut(Callback):
    """Keeps the losses of left-out rows at some steps of a training."""

    def __init__(self, data: TaskMixture, rows: Sequence[Row], marks: Sequence[int]) -> None:
        self._data = data
        self._rows = rows
        self._marks = marks
        self.losses: dict[int, Tensor] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: object) -> None:
        step = trainer.global_step
        if step in self._marks and step not in self.losses:
            measured = _Measured(self._data, self._rows, pl_module.device)
            self.losses[step] = measured.losses(pl_module.model)[0]  # type: ignore[arg-type]


class _StopAt(Callback):
    """Ends a training early, on the schedule of all its steps."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: object) -> None:
        if trainer.global_step >= self._step:
            trainer.should_stop = True


def divided(count: int, folds: int, seed: int) -> list[_Part]:
    """Divide the numbers of some rows into folds, each of which is left out once; the seed draws them."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    parts = []
    for fold in range(folds):
        left_out = sorted(order[fold::folds])
        parts.append(_Part([row for row in range(count) if row not in left_out], left_out))
    return parts


def _mixture_of(data: TaskMixture, rows: Sequence[Row], split: str) -> TaskMixture:
    """Return a mixture of some rows of its one task, all in one split."""
    (task,) = data.roles
    return data.of_rows({task: [replace(row, split=split) for row in rows]})


def kind_of(experts: Sequence[StoredExpert]) -> tuple[Callable[..., Expert], str | list[str]]:
    """Return how the first of some experts that tells it was trained: the type with its settings, and the modules."""
    for expert in experts:
        settings: Mapping[str, Any] = expert.record.get("hyperparameters") or {}
        modules = settings.get("modules")
        if not modules or "+" in expert.record["kind"]:
            continue
        try:
            kind = find_class(expert.record.get("class_path") or expert.record["kind"], Expert)
        except ValueError:
            continue
        known = {name: settings[name] for name in inspect.signature(kind).parameters if name in settings}
        return partial(kind, **known), modules
    return SparseExpert, "all-linear"


def adapt(
    experts: Sequence[str | Path | StoredExpert],
    tasks: Tasks | TaskMixture,
    out: str | Path,
    expert: ExpertKind | None = None,
    modules: str | list[str] | None = None,
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
    """Train an expert of a new task on few rows, from the best of several starts that a library gives.

    The starts are the base, the nearest expert, a weighted sum of the nearest ones, and the average of all.

    Args:
        experts: Experts of other tasks, or a pattern such as `library/*`.
        tasks: The new task, whose training rows are divided into folds.
        out: Directory of the expert, which holds start and training in one delta.
        expert: The type of expert that is trained on top; as the nearest expert was trained if not given.
        modules: Its layers.
        steps: The most steps of training; folds choose among none, each quarter, and all.
        learning_rate: Peak rate; the type's own if not given.
        folds: How many parts of the rows are left out in turn, 2 to 4.
        neighbours: How many of the nearest experts get a coefficient.
        seed: Seed of the folds and of the trainings.
        overwrite: Replace an expert.
        base: The base's directory or hub id; the one in the experts' records by default.
        dtype: Data type of the base.
        progress: Wraps experts, folds and trainings.

    Raises:
        FileExistsError: `out` exists; nothing has been read.
        ValueError: There are not two rows, the task is held out, bases differ, or nothing lowers the base's loss.
    """
    target = check_target(out, overwrite)
    if not 2 <= folds <= 4:
        raise ValueError(f"folds={folds} must be from 2 to 4")
    if min(steps, neighbours) < 1:
        raise ValueError(f"steps={steps} and neighbours={neighbours} must be at least 1")
    opened = open_experts(experts, base=base)
    opened_base = Base.open(base, opened)
    data = tasks if isinstance(tasks, TaskMixture) else TaskMixture(tasks)
    rows = _rows_of(data, opened, opened_base)
    parts = divided(len(rows), min(folds, len(rows)), seed)
    with tempfile.TemporaryDirectory(prefix="adapt-") as scratch:
        place = Path(scratch)
        # The merge is measured as one more expert.
        merge = write_merged(Merged(opened, SparseAverage()), place / "merge")
        library = _Library(opened, merge, data, rows, opened_base, dtype, neighbours, place)
        starts, of_folds = library.measure(parts, progress)
        best = min((name for name in starts if name != "base"), key=lambda name: starts[name].loss(0))
        kind, own_modules = kind_of(library.nearest(range(len(rows))))
        settings: dict[str, Any] = {"expert": expert or kind, "modules": modules or own_modules, "seed": seed}
        settings |= {"learning_rate": learning_rate} if learning_rate else {}
        marks = sorted({max(1, round(steps * quarter / 4)) for quarter in (1, 2, 3, 4)})
        train = partial(_train, opened_base.place, data, steps=steps, scratch=place, dtype=dtype, settings=settings)
        names = dict.fromkeys(["base", best])
        for name, fold in progress(
            Counted([(name, fold) for name in names for fold in range(len(parts))], "trainings")
        ):
            watch = _LeftOut(data, [rows[row] for row in parts[fold].left_out], marks)
            train([rows[row] for row in parts[fold].learned], of_folds[fold][name], callback=watch)
            for step, losses in watch.losses.items():
                kept = starts[name].losses.setdefault(step, torch.zeros(len(rows), dtype=torch.float64))
                kept[parts[fold].left_out] = losses
        chosen = best if _is_better(starts[best], starts["base"]) else "base"
        count = starts[chosen].best_steps
        if chosen == "base" and count == 0:
            raise ValueError(
                f"neither an expert nor training on these {len(rows)} rows lowers the loss on left-out rows below the "
                f"base's, {starts['base'].loss(0):.4f}; give more rows, or a smaller learning_rate"
            )
        start = library.start(chosen, range(len(rows)), "final")
        deltas: Mapping[str, Delta] = start.expert if start.expert is not None else {}
        record = start.expert.record if start.expert is not None else {}
        if count:
            trained = train(rows, start, callback=_StopAt(count), out=place / "trained" / target.name)
            assert trained is not None
            record = trained.record
            deltas = trained if start.expert is None else start.expert + trained
        used = [member for member in opened if member.name in start.weights]
        adapted = {"start": chosen, "weights": start.weights, "folds": len(parts), "rows": len(rows), "steps": count}
        record = record | {
            "tasks": list(data.roles),
            "parents": as_parents(used),
            "hyperparameters": {**(record["hyperparameters"] or {}), "adapted": adapted},
            "scores": {"left_out_loss": starts[chosen].loss(count)},
        }
        write_expert(target, deltas, record, overwrite)
    return Adapted(open_expert(target), starts, chosen, count, start.weights)


def _rows_of(data: TaskMixture, experts: Sequence[StoredExpert], base: Base) -> list[Row]:
    """Return the training rows of the one task; raise ValueError if they cannot be divided."""
    if len(data.roles) != 1:
        raise ValueError(f"adapt makes an expert of one task, and {len(data.roles)} are given; name one of them")
    ((name, role),) = data.roles.items()
    if role == "held_out":
        raise ValueError(f"{name}: the rows of a held-out task are reserved for the test; give the task as held_in")
    data.read_for(base)
    rows = data.rows("train")[name]
    if len(rows) < 2:
        counted = f"{len(rows)} training row" + ("" if len(rows) == 1 else "s")
        raise ValueError(f"task {name!r} has {counted}, and folds need at least 2; label more rows")
    if known := [str(expert.place) for expert in experts if name in expert.record["tasks"]]:
        log.warning(
            "%s was trained on %s itself: these may be its training rows, and its loss on them too low",
            *(" and ".join(known), name),
        )
    return rows


def _is_better(start: Start, base: Start) -> bool:
    """Return whether a start beats the base by more than one standard error of the difference over left-out rows."""
    gains = base.losses[base.best_steps] - start.losses[start.best_steps]
    error = gains.std() * len(gains) ** 0.5
    return bool(gains.sum() > error)


class _Placed(NamedTuple):
    """A start as it is used: an expert on disk, None for the base, and the coefficients of the library's experts."""

    expert: StoredExpert | None
    weights: dict[str, float]


class _Library:
    """The experts of a library, as the rows of a new task see them."""

    def __init__(
        self,
        experts: Sequence[StoredExpert],
        merge: StoredExpert,
        data: TaskMixture,
        rows: Sequence[Row],
        base: Base,
        dtype: DType,
        neighbours: int,
        scratch: Path,
    ) -> None:
        self._experts = experts
        self._merge = merge
        self._data = data
        self._rows = rows
        self._base = base
        self._dtype = dtype
        self._neighbours = neighbours
        self._scratch = scratch
        self._losses: list[Tensor] = []

    def measure(self, parts: Sequence[_Part], progress: Progress) -> tuple[dict[str, Start], list[dict[str, _Placed]]]:
        """Measure all starts on left-out rows; return them, and the starts of each fold."""
        model = self._base.load(self._dtype)
        measured = _Measured(self._data, self._rows, model.device)
        alone, tokens = measured.losses(model)
        for member in progress(Counted([*self._experts, self._merge], "experts")):
            with applied(model, member, check=False):
                self._losses.append(measured.losses(model)[0])
        by_name = {"base": alone, "merge": self._losses[-1]}
        nearest = torch.zeros_like(alone)
        weighted = torch.zeros_like(alone)
        of_folds = []
        for number, part in enumerate(progress(Counted(parts, "folds"))):
            of_folds.append({name: self.start(name, part.learned, f"fold{number}", model) for name in NAMES})
            first = self._order(part.learned)[0]
            nearest[part.left_out] = self._losses[first][part.left_out]
            with applied(model, of_folds[-1]["neighbours"].expert or {}, check=False):
                weighted[part.left_out] = measured.losses(model)[0][part.left_out]
        by_name |= {"nearest": nearest, "neighbours": weighted}
        return {name: Start(name, tokens, {0: by_name[name]}) for name in NAMES}, of_folds

    def nearest(self, rows: Sequence[int]) -> list[StoredExpert]:
        """Return the experts, those with the lowest loss on some rows first."""
        return [self._experts[number] for number in self._order(rows)]

    def _order(self, rows: Sequence[int]) -> list[int]:
        sums = [float(losses[list(rows)].sum()) for losses in self._losses[: len(self._experts)]]
        return sorted(range(len(sums)), key=lambda number: (sums[number], number))

    def start(self, name: str, rows: Sequence[int], label: str, model: nn.Module | None = None) -> _Placed:
        """Make a start from what some rows tell."""
        if name == "base":
            return _Placed(None, {})
        if name == "merge":
            return _Placed(self._merge, {member.name: 1 / len(self._experts) for member in self._experts})
        near = self.nearest(rows)
        if name == "nearest":
            return _Placed(near[0], {near[0].name: 1.0})
        near = near[: self._neighbours]
        part = _mixture_of(self._data, [self._rows[row] for row in rows], "validation")
        part.eval_batch_size = BATCH
        objective = Objective(model or self._base.load(self._dtype), part)  # type: ignore[arg-type]
        with Combination(objective.model, near) as combination:
            first = first_coefficients(combination, "expert", [1.0])
            how = (COEFFICIENT_RATE, COEFFICIENT_STEPS)
            coefficients, _ = descend(combination, objective, batch_losses, first, *how, decay=True)
        weights = coefficients[0].tolist()
        merged = Merged(near, TaskArithmetic(weights=weights))
        placed = write_merged(merged, self._scratch / f"neighbours-{label}")
        return _Placed(placed, {member.name: weight for member, weight in zip(near, weights, strict=True)})


NAMES = ("base", "nearest", "neighbours", "merge")


def _train(
    base: str,
    data: TaskMixture,
    rows: Sequence[Row],
    start: _Placed,
    steps: int,
    scratch: Path,
    dtype: DType,
    settings: Mapping[str, Any],
    callback: Callback,
    out: Path | None = None,
) -> StoredExpert | None:
    """Train on top of a start, and return what was trained alone, if it has a place."""
    trainer = {"callbacks": [callback], "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer |= {"default_root_dir": str(scratch), "limit_val_batches": 0}
    beneath = [] if start.expert is None else [str(start.expert.path)]
    model = {"applied": beneath, "dtype": dtype}
    part = _mixture_of(data, rows, "train")
    # A dozen lines of each training would hide what is measured.
    with quiet(), logging_from(logging.WARNING, "modular_experts"):
        run = prepare("fit", base, part, out=out, steps=steps, model=model, trainer=trainer, **settings)
        try:
            return run_fit(run)
        finally:
            run.release()
