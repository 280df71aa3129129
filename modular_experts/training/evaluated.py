"""Validate, test and predict with a causal language model, as hooks of a LightningModule."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from modular_experts.base.base import DType
from modular_experts.data.batch import Batch, is_filler, source_of
from modular_experts.evaluation import TaskScores, score_batch
from modular_experts.evaluation.drafts import packs_evaluation
from modular_experts.evaluation.generation import answer_texts, cut_answers, generate_tokens, warn_of_cut_answers
from modular_experts.evaluation.metrics import TextMetric
from modular_experts.injection.sharded import await_others
from modular_experts.library import StoredExpert, warn_unlike_training
from modular_experts.library.record import Record


class EvaluatedModule(LightningModule):
    """Scores the rows of validation and test as `evaluate` does, and answers the rows of prediction."""

    model: Any
    tokenizer: Any
    max_new_tokens: int
    metrics: dict[str, TextMetric]
    applied_experts: list[StoredExpert]
    dtype_name: DType
    preferences: Any = None
    batch_losses: Callable[..., tuple[Tensor, Tensor]]
    _packs_evaluation: bool | None = None

    @abstractmethod
    def model_facts(self) -> Record:
        """Return what identifies the model, for the results."""

    def on_test_start(self) -> None:
        if self.trainer.state.fn != "fit" and self.trainer.is_global_zero:
            warn_unlike_training(self.applied_experts, source_of(self.trainer).reading_of, self.dtype_name)

    on_validation_start = on_predict_start = on_test_start

    def on_validation_epoch_start(self) -> None:
        roles = source_of(self.trainer).roles
        if not roles:
            raise ValueError("scores need the role of each task: give a TaskMixture or another DataSource")
        self.scores = TaskScores(roles, self.metrics).to(self.device)
        # A fit moves values alone, so it asks once; `ExpertModule.on_fit_start` forgets the answer.
        if self.trainer.state.fn != "fit" or self._packs_evaluation is None:
            self._packs_evaluation = packs_evaluation(self.model)

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score one batch; within `fit` by the loss that is trained alone."""
        if self.trainer.state.fn == "fit" and self.preferences:
            self.scores.update(batch, *self.batch_losses(self.model, batch))
        else:
            tokens = None if self.trainer.state.fn == "fit" else self.max_new_tokens
            score_batch(self.scores, self.model, self._reader, batch, tokens, bool(self._packs_evaluation))
        await_others(self.model)

    test_step = validation_step

    @property
    def _reader(self) -> Any:
        """The tokenizer that read the rows."""
        return source_of(self.trainer).tokenizer or self.tokenizer

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, str]]:
        """Return the task, input, target, if there is one, and generation of each row."""
        answers = generate_tokens(self.model, self._reader, batch, self.max_new_tokens)
        await_others(self.model)
        cut = cut_answers(self.model, self._reader, batch, answers, self.max_new_tokens)
        self._cut += [is_cut for is_cut, filler in zip(cut, is_filler(batch), strict=True) if not filler]
        texts = answer_texts(self._reader, batch, answers)
        columns = zip(batch["task"], batch["input"], batch["target"], texts, strict=True)
        rows = [dict(zip(("task", "input", "target", "generation"), row, strict=True)) for row in columns]
        return [{name: value for name, value in row.items() if value is not None} for row in rows]

    def on_predict_epoch_start(self) -> None:
        self._cut: list[bool] = []

    def on_predict_epoch_end(self) -> None:
        warn_of_cut_answers(self.model, sum(self._cut), len(self._cut), self.max_new_tokens)

    def on_validation_epoch_end(self) -> None:
        self._conclude()
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        self._conclude()
        self._log_scores("test")

    def _log_scores(self, stage: str) -> None:
        """Log every score: `test_loss/dates` of a task, `test_loss` the mean over held-in tasks, `test_loss_held_out`.

        `trainer.validate` and `trainer.test` return these numbers, which are the same in all processes.
        """
        for task, scores in self.results["tasks"].items():
            self.log_dict({f"{stage}_{name}/{task}": scores[name] for name in self.scores.divisors if name in scores})
        for role, ending in (("held_in", ""), ("held_out", "_held_out")):
            for name, mean in self.results[role].items():
                self.log(f"{stage}_{name}{ending}", mean, prog_bar=stage == "val" and name == "loss")

    def _conclude(self) -> None:
        self.results = self.scores.compute()
        for name, cut in self.scores.cut.items() if self.trainer.is_global_zero else ():
            rows = self.results["tasks"].get(name, {}).get("rows", 0)
            warn_of_cut_answers(self.model, cut, rows, self.max_new_tokens, name)
        self.results["model"] = self.model_facts()
