"""Learn from experts' answers to inputs of their own tasks, without labels: a merge, or one new expert.

`distill` finds coefficients of a merge, the method `Distilled`. `distill_into` trains an expert on the experts'
predictions, which takes longer and keeps more.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Unpack

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from transformers import PreTrainedModel

from modular_experts.base import Base, DType
from modular_experts.base.apply import applied
from modular_experts.base.device import device
from modular_experts.data import Inputs, TaskMixture
from modular_experts.data.batch import Batch, Collator, Example
from modular_experts.data.tasks import Tasks
from modular_experts.data.tokenised import ReadingFacts, TaskContents
from modular_experts.evaluation import answer_logits
from modular_experts.experts import SparseExpert
from modular_experts.injection import context_length
from modular_experts.injection.task_heads import put_task_heads
from modular_experts.library import StoredExpert, as_parents, check_target, open_expert, open_experts, write_expert
from modular_experts.library.compatibility import training_in_common
from modular_experts.merging.gradient_search import ATLAS
from modular_experts.merging.merged import warn_of_own_parents
from modular_experts.merging.objective import (
    ANSWERED_ROWS,
    Objective,
    Prediction,
    ValidationRows,
    answers_of,
    batch_divergences,
    objective_on_base,
    own_experts,
    prediction,
)
from modular_experts.merging.search import Searched, places_of, search
from modular_experts.methods import Distilled, IsoC, MergeMethod, SelfRegMean
from modular_experts.progress import Counted, Progress
from modular_experts.training.fit import ExpertKind, FitSettings, fit

VALIDATED = 16
"""One of so many inputs of a task measures how well the expert repeats answers, and is not learned."""


def without_data(experts: Sequence[StoredExpert]) -> MergeMethod:
    """Return the merge method that kept most of such experts without data (`docs/results/smollm2.md`)."""
    all_low_rank = all({*expert.forms().values()} == {"LowRank"} for expert in experts)
    return IsoC() if all_low_rank else SelfRegMean(flatten=0.5)


def distill(
    experts: Sequence[str | Path | StoredExpert],
    out: str | Path,
    method: Distilled | None = None,
    data: TaskMixture | None = None,
    overwrite: bool = False,
    progress: Progress = iter,
    base: str | None = None,
    dtype: DType | None = None,
    read: Callable[..., Objective] = objective_on_base,
) -> Searched:
    """Merge experts by the answers of each to inputs of its own task; `Distilled` explains how.

    Args:
        experts: Directories of the experts, or opened ones.
        out: Directory of the merged expert. The merge that it starts from is written beside.
        method: The settings; the defaults if not given.
        data: Tasks, whose training and validation inputs are taken; if not given, the inputs that the experts keep.
        overwrite: Whether files that exist may be replaced.
        base: The base's directory or hub id; the one in the experts' records by default.
        dtype: Data type of the base; as it is stored if not given.
        read: Makes the objective, as for `search`.

    Raises:
        FileExistsError: A file would be replaced; no input has been read yet.
        ValueError: There are no inputs, or `search` refuses the experts.
    """
    method = method or Distilled()
    opened = open_experts(experts, base=base)
    warn_of_own_parents(opened)
    start = method.start or without_data(opened)
    for target in [out, *places_of([start], opened, out)]:
        check_target(target, overwrite)
    data = data or Inputs.kept_by(opened)
    if not isinstance(data, Inputs):
        data.read_for(Base.open(base, opened))
        data = Inputs.read_from(data, ["train", "validation"], method.rows)
    # A copy, because the batches of the caller's inputs keep their size.
    data = data.only([*data.roles])
    data.eval_batch_size = method.batch
    rows = ValidationRows(data, method.rows, base, "experts", {}, method.max_new_tokens, dtype)
    algorithm = ATLAS(method.steps, method.learning_rate, objective="distill", per="row", decay=True)
    return search(opened, algorithm, rows, out, [start], overwrite, progress, read)


def distill_into(
    experts: Sequence[str | Path | StoredExpert],
    out: str | Path,
    into: ExpertKind = SparseExpert,
    modules: str | list[str] = "all-linear",
    tasks: Tasks | TaskMixture | None = None,
    rows: int = 400,
    max_new_tokens: int = 64,
    base: str | None = None,
    dtype: DType = "float32",
    progress: Progress = iter,
    **settings: Unpack[FitSettings],
) -> StoredExpert:
    """Train one expert on the answers of many experts to inputs of their own tasks.

    It lowers the divergence `KL(expert || new expert)` from the prediction of a task's own expert at each token of
    its answer, as knowledge distillation does (Hinton et al., arXiv 1503.02531). Training on the answers alone, as if
    they were labels, keeps as much and loses more on other tasks.

    Args:
        experts: Directories of the experts, or opened ones.
        out: Directory of the expert.
        into: The type of the new expert.
        modules: The layers that it trains.
        tasks: The experts' tasks, whose training inputs are taken; if not given, the inputs that the experts keep.
        rows: The most inputs of one task.
        max_new_tokens: The most tokens of an expert's answer.
        base: The base's directory or hub id; the one in the experts' records by default.
        dtype: Data type of the base.
        progress: Wraps the tasks whose inputs are answered.
        **settings: What `FitSettings` lists but `model` and `data`; without a length, three epochs.

    Raises:
        FileExistsError: `out` exists; nothing has been read yet.
        ValueError: There are no inputs, or a task has no expert of its own.
    """
    target = check_target(out, settings.get("overwrite", False))
    if min(rows, max_new_tokens) < 1:
        raise ValueError(f"rows={rows} and max_new_tokens={max_new_tokens} must be at least 1")
    opened = open_experts(experts, base=base)
    warn_of_own_parents(opened)
    opened_base = Base.open(base, opened)
    inputs = _inputs(tasks, opened, opened_base, rows)
    own = own_experts(opened, list(inputs.roles))
    model = opened_base.load(dtype).to(device())  # type: ignore[arg-type]
    put_task_heads(model, opened)
    inputs.fit_context(context_length(model))
    answered = _Answers(model, own, inputs, max_new_tokens, progress)
    taught = _Taught(inputs, answered, training_in_common(opened).get("chat_template"))
    taught.batch_size = settings.pop("batch_size", taught.batch_size)
    trainer = settings.get("trainer", {})
    settings["trainer"] = {**trainer, "callbacks": [_LearnPredictions(), *trainer.get("callbacks", [])]}
    fit(model, taught, into, modules, target, **settings)
    trained = open_expert(target)
    distilled = {task: len(part) for task, part in taught.answers.items()}
    record = trained.record | {
        "parents": as_parents(opened),
        "hyperparameters": trained.record["hyperparameters"] | {"distilled": distilled},
    }
    encoding = trained.record.get("encoding", "float32")
    kept = {"state": trained.state(), "encoding": encoding, "inputs": trained.inputs()}
    write_expert(target, trained.items(), record, overwrite=True, **kept)
    return open_expert(target)


def _inputs(tasks: Tasks | TaskMixture | None, experts: Sequence[StoredExpert], base: Base, rows: int) -> Inputs:
    """Return at most some training inputs of each task, or those that the experts keep."""
    if tasks is None:
        inputs = Inputs.kept_by([expert for expert in experts if not expert.is_merge])
        inputs.take_tokenizer(base)
        inputs.eval_limit = rows
        return inputs
    data = tasks if isinstance(tasks, TaskMixture) else TaskMixture(tasks)
    data.read_for(base)
    return Inputs.read_from(data, ["train"], rows)


class _Answers:
    """Rows with the answers of their tasks' own experts, and what the experts predict at each token of them."""

    def __init__(
        self,
        model: PreTrainedModel,
        own: Mapping[str, StoredExpert],
        inputs: Inputs,
        max_new_tokens: int,
        progress: Progress,
    ) -> None:
        self.rows: dict[str, list[Example]] = {}
        self.predictions: dict[Example, Prediction] = {}
        collate = Collator(inputs.row_tokenizer().pad_id, texts=False)
        prompts = inputs.input_examples(["train"])
        for task in progress(Counted(prompts, "tasks")):
            rows = answers_of(own[task], prompts[task], model, inputs, ANSWERED_ROWS, max_new_tokens)
            # A row may have no answer where the model's context ends.
            self.rows[task] = [row for row in rows if len(row.tokens.ids) > row.tokens.prompt]
            with applied(model, own[task], check=False):
                self._predict(model, self.rows[task], collate)

    @torch.no_grad()
    def _predict(self, model: PreTrainedModel, rows: Sequence[Example], collate: Collator) -> None:
        ordered = sorted(rows, key=lambda row: len(row.tokens.ids))
        for first in range(0, len(ordered), ANSWERED_ROWS):
            part = ordered[first : first + ANSWERED_ROWS]
            logits, _ = answer_logits(model, collate(part))
            found = prediction(logits)
            counts = [len(row.tokens.ids) - row.tokens.prompt for row in part]
            split = zip(found.ids.cpu().split(counts), found.likelihoods.cpu().split(counts), strict=True)
            self.predictions |= {row: Prediction(*own) for row, own in zip(part, split, strict=True)}


class _Taught(Inputs):
    """Inputs with the answers of experts as targets; a few validate, and the others train."""

    def __init__(self, inputs: Inputs, answers: _Answers, template: str | None) -> None:
        super().__init__(inputs.prompts, tokenizer=inputs.tokenizer, max_length=inputs.max_length)
        self.context = inputs.context
        self.answers = answers.rows
        self._predictions = answers.predictions
        self._template = template

    def examples(self, split: str) -> dict[str, list[Example]]:
        """Return the rows of `train` or `validation`."""
        validates = split == "validation"
        # The first row always trains.
        parts = {
            task: [row for number, row in enumerate(rows) if (number % VALIDATED == 1) == validates]
            for task, rows in self.answers.items()
        }
        return {task: rows for task, rows in parts.items() if rows}

    def reading_of(self, tasks: object) -> ReadingFacts:
        """Return how the experts' rows became tokens."""
        return {"max_length": self.max_length, "chat_template": self._template}

    @property
    def contents(self) -> dict[str, TaskContents]:
        """Nothing: the rows are in no file."""
        return {}

    def _training_batch(self, examples: Sequence[Example]) -> Batch:
        batch = super()._training_batch(examples)
        # Packs change the order of rows.
        order = (
            batch["row"][batch["row"] >= 0].unique_consecutive().tolist() if "row" in batch else range(len(examples))
        )
        parts = [self._predictions[examples[row]] for row in order if examples[row] in self._predictions]
        if parts:
            ids, likelihoods = zip(*parts, strict=True)
            batch["prediction"] = Prediction(torch.cat(ids), torch.cat(likelihoods))
        return batch


class _LearnPredictions(Callback):
    """Lets a module lower the divergence from the experts' predictions, in place of the cross-entropy."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.batch_losses = batch_divergences  # type: ignore[assignment]
