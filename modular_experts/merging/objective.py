"""Measure validation rows by task, of one loaded model and of deltas added to it: what a search lowers.

That is the loss, the entropy, or the distance to each task's own expert. Each measure takes a model and a batch, and
returns a sum and a count for each row, whose ratio is lowered.
"""

import json
import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Literal, NamedTuple, get_args

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from modular_experts.base import Base, DType
from modular_experts.base.apply import Applied, applied
from modular_experts.base.device import device
from modular_experts.data import Inputs, TaskMixture
from modular_experts.data.batch import IGNORED, Batch, Collator, Example
from modular_experts.deltas import Delta
from modular_experts.evaluation import answer_logits, answered, batch_losses, row_sums
from modular_experts.injection import context_length
from modular_experts.injection.attach import put_on_answers
from modular_experts.injection.routed import Injected
from modular_experts.injection.task_heads import put_task_heads
from modular_experts.library import StoredExpert
from modular_experts.library.compatibility import check_act_alike
from modular_experts.library.record import Facts, Record, plain
from modular_experts.progress import Counted, Progress

Aim = Literal["loss", "entropy", "distill"]
Measure = Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]

KEPT_TOKENS = 256
"""How many likeliest tokens of a prediction are kept: of a larger vocabulary the others count as one token."""
ANSWERED_ROWS = 16
"""How many rows are answered together, if batches have fewer; a generated token costs about the same for few rows."""


@dataclass(frozen=True)
class Trial:
    """One candidate: its settings, and the loss of each task."""

    settings: Record
    losses: dict[str, float]

    @property
    def loss(self) -> float:
        """The mean over the tasks; infinite if it is NaN."""
        return mean_loss(self.losses)


class Objective:
    """The loss per target token of each task's validation rows, as `evaluation.measure` gives it.

    Args:
        model: A causal language model without injected experts; it is switched to evaluation mode.
        data: Held-in tasks, with the model's tokenizer. At most `data.eval_limit` rows of each are measured, spread
            evenly over its file, in batches of `data.eval_batch_size`.
        answered_by: The expert of each task, whose answers take the place of the targets; the rows need inputs only.
        max_new_tokens: The most tokens of such an answer.
        judged: How many batches of each task `losses` reads; all if not given.
        on_answers: Whether deltas act on answers alone.

    Attributes:
        batches: Each task's, in an order at random that is always the same.
        origin: Entries for a record about experts that answered.

    Raises:
        ValueError: A task is held out, which reserves its rows for the test, or it has no validation rows.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        data: TaskMixture,
        answered_by: Mapping[str, Mapping[str, Delta]] | None = None,
        max_new_tokens: int = 64,
        progress: Progress = iter,
        judged: int | None = None,
        on_answers: bool = False,
    ) -> None:
        self.model = model.eval()
        self.on_answers = on_answers
        self.batches: dict[str, list[Batch]] = {}
        self.origin: Record = {}
        self._judged = judged
        data.fit_context(context_length(model))
        examples = dict(read_validation_rows(data, targets=answered_by is None))
        size = data.eval_batch_size
        if answered_by is not None:
            together = max(size, ANSWERED_ROWS)
            for task in progress(Counted(examples, "tasks")):
                with self.added(answered_by[task]):
                    examples[task] = answers_to(examples[task], model, data, together, max_new_tokens)
        collate = Collator(data.row_tokenizer().pad_id, texts=False)
        for task, rows in examples.items():
            # Shorter rows first, to save padding.
            ordered = sorted(rows, key=lambda row: len(row.tokens.ids))
            parts = [ordered[start : start + size] for start in range(0, len(ordered), size)]
            # A search of fewer steps than batches is to meet short rows and long ones alike.
            random.Random(0).shuffle(parts)
            self.batches[task] = [move_data_to_device(collate(part), model.device) for part in parts]

    def added(self, deltas: Mapping[str, Delta], scale: float = 1.0) -> Applied | Injected:
        """Add `scale` times deltas to the model, until `remove` or the end of a `with`."""
        if self.on_answers:
            scaled = {name: delta * scale for name, delta in deltas.items()}
            return put_on_answers(self.model, [scaled], check=False)
        return applied(self.model, deltas, scale, check=False)

    def check_acts_as(self, experts: Sequence[StoredExpert]) -> None:
        """Raise ValueError if experts act on answers alone, and the deltas of this objective do not, or the reverse."""
        if check_act_alike(experts) != self.on_answers:
            raise ValueError(
                f"on_answers={self.on_answers} of the objective is not how {experts[0].name} acts; make the objective "
                f"with on_answers={not self.on_answers}"
            )

    @torch.no_grad()
    def remember(self, experts: Mapping[str, Mapping[str, Delta]], progress: Progress = iter) -> None:
        """Keep in each batch what the expert of its task predicts there, on the model at the base."""
        for task in progress(Counted(self.batches, "tasks")):
            with self.added(experts[task]):
                for batch in self.batches[task]:
                    batch["prediction"] = prediction(answer_logits(self.model, batch)[0])

    @torch.no_grad()
    def losses(self, measure: Measure = batch_losses, tasks: Sequence[str] | None = None) -> dict[str, float]:
        """Return the loss of each task, or of some, with the model's present weights, or another measure of it."""
        losses = {}
        for task in self.batches if tasks is None else tasks:
            parts = [measure(self.model, batch) for batch in self.batches[task][: self._judged]]
            summed = math.fsum(sums.sum().item() for sums, _ in parts)
            losses[task] = summed / sum(int(counts.sum()) for _, counts in parts)
        return losses

    def losses_with(
        self, deltas: Mapping[str, Delta], scale: float = 1.0, tasks: Sequence[str] | None = None
    ) -> dict[str, float]:
        """Return the loss of each task, or of some, with `scale` times the deltas added to the model."""
        with self.added(deltas, scale):
            return self.losses(tasks=tasks)

    @torch.no_grad()
    def losses_within(self, deltas: Mapping[str, Delta], most: float, tasks: Sequence[str]) -> dict[str, float] | None:
        """Return the loss of some tasks with deltas added, or None once their mean is sure to be above `most`."""
        losses: dict[str, float] = {}
        with self.added(deltas):
            for task in tasks:
                total = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in self.batches[task])
                parts: list[float] = []
                for batch in self.batches[task]:
                    parts.append(batch_losses(self.model, batch)[0].sum().item())
                    losses[task] = math.fsum(parts) / total
                    # No row that is left has a loss below 0.
                    if math.fsum(losses.values()) / len(tasks) > most:
                        return None
        return losses


def answers_of(
    expert: Mapping[str, Delta],
    rows: Sequence[Example],
    model: PreTrainedModel,
    data: TaskMixture,
    together: int,
    max_new_tokens: int,
) -> list[Example]:
    """Return rows of a mixture with an expert's own answers as targets; some rows are answered together."""
    with applied(model, expert, check=False):
        return answers_to(rows, model, data, together, max_new_tokens)


def answers_to(
    rows: Sequence[Example], model: PreTrainedModel, data: TaskMixture, together: int, max_new_tokens: int
) -> list[Example]:
    """Return rows of a mixture with the model's answers as targets; some rows are answered together."""
    reader = data.row_tokenizer()
    collate = Collator(reader.pad_id)
    return answered(model, reader.tokenizer, rows, collate, together, data.longest, max_new_tokens)


def read_validation_rows(data: TaskMixture, targets: bool = True) -> dict[str, list[Example]]:
    """Read and tokenise the validation rows of each task, with targets or as inputs alone; refuse held-out tasks."""
    if held_out := [name for name, role in data.roles.items() if role == "held_out"]:
        names = ", ".join(held_out)
        raise ValueError(f"{names}: the rows of a held-out task are reserved for the test; leave the task out")
    return data.validation_examples(targets)


Labels = Literal["rows", "experts"]


@dataclass(frozen=True)
class ValidationRows:
    """The rows that a tuning or a search measures, and who labels them.

    Args:
        data: Tasks whose validation rows are measured, and how their rows are read: what you gave to `fit`. Default:
            the inputs that the experts keep (`fit --keep_inputs`), which the experts answer.
        rows: The most rows of one task, spread evenly over its validation rows.
        base: The base's directory or hub id; the one in the experts' records by default.
        labels: Take the targets of the `rows`, or the answers of the `experts` to the inputs of their own tasks.
        expert_of: The expert of each task: {dates: library/dates}; by default the record tells it.
        max_new_tokens: The most tokens of an expert's answer.
        dtype: Data type of the base; by default as it is stored, and float32 for statistics.
    """

    data: TaskMixture | None = None
    rows: int = 64
    base: str | None = None
    labels: Labels = "rows"
    expert_of: Mapping[str, str | Path] = field(default_factory=dict)
    max_new_tokens: int = 64
    dtype: DType | None = None

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"rows={self.rows} must be at least 1 row of a task")
        if self.labels not in get_args(Labels):
            raise ValueError(f"labels={self.labels!r} must be 'rows', whose targets count, or 'experts', who answer")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1 token of an answer")

    def of_experts(self, experts: Sequence[StoredExpert]) -> tuple[TaskMixture, Labels]:
        """Return the data and who labels them: without data, the inputs that the experts keep, and the experts."""
        if self.data is not None:
            return self.data, self.labels
        return Inputs.kept_by([expert for expert in experts if not expert.is_merge]), "experts"


def objective_on_base(
    experts: Sequence[StoredExpert],
    data: ValidationRows | TaskMixture,
    distills: bool = False,
    progress: Progress = iter,
    model: PreTrainedModel | None = None,
    judged: int | None = None,
) -> Objective:
    """Return the objective on the base of stored experts, loaded on the GPU if there is one.

    Data without a tokenizer are read with the base's. With `distills` the objective also keeps the predictions of each
    task's own expert. A caller who has loaded the base gives it as `model`. `judged` is `Objective`'s.

    Raises:
        ValueError: The experts were trained on another base, a task's expert cannot be told, or `Objective` refuses
            the data; nothing has been loaded.
    """
    rows = ValidationRows(data) if isinstance(data, TaskMixture) else data
    mixture, labels = rows.of_experts(experts)
    # A copy, because the limit below is ours, and the caller's mixture keeps its own.
    mixture = mixture.only(list(mixture.roles))
    by_experts = labels == "experts"
    if rows.expert_of and not (by_experts or distills):
        raise ValueError("expert_of says whose expert answers a task; add labels=experts, or leave it out")
    own: dict[str, StoredExpert] = {}
    if by_experts or distills:
        own = own_experts(experts, list(mixture.roles), rows.expert_of)
    base = Base.open(rows.base, experts)
    mixture.take_tokenizer(base)
    mixture.eval_limit = min(rows.rows, mixture.eval_limit or rows.rows)
    # A task that is refused is refused before the base is loaded.
    read_validation_rows(mixture, targets=not by_experts)
    if model is None:
        model = base.load(rows.dtype).to(device())  # type: ignore[arg-type]
        put_task_heads(model, experts)
    labelled_by = own if by_experts else None
    act_alike = check_act_alike(experts)
    objective = Objective(model, mixture, labelled_by, rows.max_new_tokens, progress, judged, on_answers=act_alike)
    if own:
        objective.origin = {"labels": labels, "expert_of": {task: expert.name for task, expert in own.items()}}
    if by_experts:
        objective.origin["max_new_tokens"] = rows.max_new_tokens
    if distills:
        objective.remember(own, progress)
    return objective


def check_tasks(experts: Sequence[StoredExpert], tasks: Collection[str]) -> None:
    """Raise ValueError if an expert was trained on none of the tasks."""
    for expert in experts:
        if not set(expert.record["tasks"]) & set(tasks):
            own = ", ".join(expert.record["tasks"])
            raise ValueError(f"{expert.place} was trained on {own}, and the data has {', '.join(tasks)}; add its task")


def own_experts(
    experts: Sequence[StoredExpert], tasks: Sequence[str], expert_of: Mapping[str, str | Path] | None = None
) -> dict[str, StoredExpert]:
    """Return the expert of each task: the one that `expert_of` gives, or the one whose record names the task.

    If several records name the task, the expert with the fewest tasks counts: a merge must not answer for its parents.

    Raises:
        ValueError: No record or several records name a task, or `expert_of` gives it an expert that is not there.
    """
    chosen = expert_of or {}
    for task in chosen:
        if task not in tasks:
            known = ", ".join(tasks)
            raise ValueError(f"expert_of names {task!r}, which is not a task of the data; they are {known}")
    return {task: _own_expert(experts, task, chosen.get(task)) for task in tasks}


def _own_expert(experts: Sequence[StoredExpert], task: str, place: str | Path | None) -> StoredExpert:
    """Return the expert at a place, or the one expert with the fewest tasks whose record names a task."""
    if place is not None:
        for expert in experts:
            if Path(place).resolve() in (expert.path.resolve(), Path(expert.place).resolve()):
                return expert
        listed = ", ".join(str(expert.place) for expert in experts)
        raise ValueError(f"expert_of gives {task} the expert {place}, which is not among {listed}")
    naming = [expert for expert in experts if task in expert.record["tasks"]]
    fewest = min((len(expert.record["tasks"]) for expert in naming), default=0)
    naming = [expert for expert in naming if len(expert.record["tasks"]) == fewest]
    if len(naming) == 1:
        return naming[0]
    example = experts[0]
    why = "no record names"
    if naming:
        example = naming[0]
        why = f"the records of {' and '.join(str(expert.place) for expert in naming)} name"
    raise ValueError(
        f"{why} the task {task}; name the expert that answers it, such as expert_of={{{task}: {example.place}}}"
    )


def write_trials(out: str | Path, trials: Sequence[Trial]) -> Path:
    """Write the trials as JSON into the directory of an expert, in order; a loss that is not finite becomes null."""
    file = Path(out).expanduser() / "trials.json"
    rows = [{**asdict(trial), "loss": trial.loss} for trial in trials]
    file.write_text(json.dumps(plain(rows), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return file


def record_notes(settings: Facts, losses: Mapping[str, float]) -> Record:
    """Return for the record of a merge how it was searched: the settings, and the losses on its validation rows."""
    scores = {"val_loss": mean_loss(losses), **{f"val_loss/{task}": loss for task, loss in losses.items()}}
    return {"hyperparameters": {**settings, "tuned_on": sorted(losses)}, "scores": scores}


def mean_loss(losses: Mapping[str, float]) -> float:
    """Return the mean over the tasks; NaN becomes infinite, so that it never wins."""
    mean = fmean(losses.values())
    return math.inf if math.isnan(mean) else mean


def batch_entropies(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return each row's summed entropy in nats where it predicts its target, and its number of target tokens."""
    logits, _ = answer_logits(model, batch)
    likelihoods = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return row_sums(batch, -(likelihoods.exp() * likelihoods).sum(-1))


class Prediction(NamedTuple):
    """What a model predicts at `m` places: ids of the likeliest tokens `(m, k)`, and the log-likelihoods `(m, k + 1)`
    of these and of all others together, or `(m, k)` if there are no others.
    """

    ids: Tensor
    likelihoods: Tensor


def prediction(logits: Tensor, kept: int = KEPT_TOKENS) -> Prediction:
    """Return the prediction that logits `(m, vocabulary)` make, of the likeliest `kept` tokens and the others."""
    ids = logits.topk(min(kept, logits.shape[-1])).indices
    return Prediction(ids.int(), _log_likelihoods(logits, ids))


def batch_divergences(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return each row's summed divergence from the prediction of its task's own expert, and its number of tokens.

    At a place where the expert gives the tokens the likelihoods p, and the model q, it is `KL(p || q) = sum_v p_v (log
    p_v - log q_v)` in nats; tokens that `Prediction` counts as one are one `v`. `Objective.remember` puts the
    prediction into the batch.
    """
    expert: Prediction = batch["prediction"]
    likelihoods = _log_likelihoods(answer_logits(model, batch)[0], expert.ids.long())
    # An expert that excludes a token gives it no share of the sum.
    terms = torch.where(expert.likelihoods > -torch.inf, expert.likelihoods - likelihoods, 0)
    return row_sums(batch, (expert.likelihoods.exp() * terms).sum(-1))


def _log_likelihoods(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the log-likelihoods of the tokens `ids` `(m, k)`, and of all others together if there are others."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chosen = logits.gather(-1, ids)
    if ids.shape[-1] < logits.shape[-1]:
        others = logits.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        chosen = torch.cat([chosen, others], -1)
    # The parts add up to one exactly, whatever rounding did to them.
    return chosen.log_softmax(-1)


MEASURES: dict[Aim, Measure] = {"loss": batch_losses, "entropy": batch_entropies, "distill": batch_divergences}
