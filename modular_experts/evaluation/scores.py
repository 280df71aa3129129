"""Scores: what a model did on each task, summed row by row so that any number of processes give the same result.

Loss per target token, exact match, Rouge-L and choice accuracy, per task, and their means over the held-in and over
the held-out tasks. Nothing is generated here (`generation.py`) and nothing is written (`results.py`).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.text.rouge import rouge_score

from modular_experts.data.batch import Batch, is_filler

__all__ = ["TaskScores", "rouge_l", "words"]

_SUMS = ("loss", "exact_match", "rougeL", "choice_accuracy")
_COUNTS = ("rows", "tokens", "generated", "chosen")


class TaskScores(Metric):
    """Scores by task.

    Args:
        tasks: Each task's role, `held_in` or `held_out`, by name.
    """

    full_state_update = False
    higher_is_better = None
    is_differentiable = False

    def __init__(self, tasks: Mapping[str, str]) -> None:
        super().__init__()
        self.roles = dict(tasks)
        for name in _SUMS:
            self.add_state(f"{name}_sum", torch.zeros(len(tasks)), dist_reduce_fx="sum")
        for name in _COUNTS:
            self.add_state(f"{name}_count", torch.zeros(len(tasks), dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self,
        batch: Batch,
        token_loss_sums: Tensor,
        token_counts: Tensor,
        generations: Sequence[str] | None = None,
        choice_scores: Tensor | None = None,
    ) -> None:
        """Count one batch; filler rows are left out.

        Args:
            batch: As `data/batch.py` says, with texts, for `n` rows.
            token_loss_sums: `(n,)` from `row_losses`.
            token_counts: `(n,)` from `row_losses`.
            generations: What the model wrote for each row.
            choice_scores: `(m,)` from `choice_log_likelihoods`, one per choice of the batch.
        """
        number = {name: index for index, name in enumerate(self.roles)}
        rows = [row for row, filler in enumerate(is_filler(batch)) if not filler]
        tasks = torch.tensor([number[batch["task"][row]] for row in rows], dtype=torch.int64)
        self._add("rows_count", tasks, torch.ones(len(rows)))
        self._add("loss_sum", tasks, token_loss_sums[rows])
        self._add("tokens_count", tasks, token_counts[rows])
        if generations is not None:
            pairs = [(generations[row], batch["target"][row]) for row in rows]
            self._add("generated_count", tasks, torch.ones(len(rows)))
            self._add(
                "exact_match_sum", tasks, torch.tensor([float(made.strip() == want.strip()) for made, want in pairs])
            )
            self._add(
                "rougeL_sum", tasks, torch.tensor([rouge_l(made, want) for made, want in pairs], dtype=torch.float64)
            )
        if choice_scores is not None and "choices" in batch:
            chosen, right = _best_choices(batch["choices"], choice_scores)
            of = torch.tensor([number[batch["task"][row]] for row in chosen], dtype=torch.int64)
            self._add("chosen_count", of, torch.ones(len(chosen)))
            self._add("choice_accuracy_sum", of, torch.tensor(right, dtype=torch.float64))

    def compute(self) -> dict[str, Any]:
        """Return the scores: "tasks" by name, and "held_in" and "held_out", unweighted means over tasks that have rows.

        A task of which no row was seen is left out, as is a score that nothing was measured for. Exact match, Rouge-L
        and choice accuracy are shares between 0 and 1; the loss is in nats per target token, end-of-sequence included.
        """
        tasks = {name: self._task(index) for index, name in enumerate(self.roles)}
        tasks = {name: scores for name, scores in tasks.items() if scores["rows"]}
        means = {
            role: _mean([scores for scores in tasks.values() if scores["role"] == role])
            for role in ("held_in", "held_out")
        }
        return {"tasks": tasks, **means}

    def _task(self, index: int) -> dict[str, Any]:
        counts = {name: int(getattr(self, f"{name}_count")[index]) for name in _COUNTS}
        of = {"loss": "tokens", "exact_match": "generated", "rougeL": "generated", "choice_accuracy": "chosen"}
        sums = {name: float(getattr(self, f"{name}_sum")[index]) for name in _SUMS}
        scores = {name: sums[name] / counts[of[name]] for name in _SUMS if counts[of[name]]}
        return {"role": list(self.roles.values())[index], "rows": counts["rows"], **scores}

    def _add(self, name: str, tasks: Tensor, values: Tensor) -> None:
        state = getattr(self, name)
        if state.is_floating_point() and state.device.type != "mps":  # which has no float64
            state = state.double()  # also undoes a module.to(bfloat16), which reaches a metric that is still zero
        tasks, values = tasks.to(state.device), values.detach().to(state)
        setattr(self, name, state.index_add(0, tasks, values))


def _best_choices(choices: Batch, scores: Tensor) -> tuple[list[int], list[float]]:
    """Return the rows that have choices, and 1.0 where the likeliest one (the first of equals) is the correct one."""
    best: dict[int, int] = {}
    values = scores.tolist()
    for place, row in enumerate(choices["row"].tolist()):
        if row not in best or values[place] > values[best[row]]:
            best[row] = place
    return list(best), [float(choices["correct"][place]) for place in best.values()]


def _mean(tasks: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    measured = {name: [scores[name] for scores in tasks if name in scores] for name in _SUMS}
    return {name: sum(values) / len(values) for name, values in measured.items() if values}


# Scripts without spaces between words: each character is a word (kana, Han, and Han's extensions).
_CHARACTER_WORDS = re.compile(r"([぀-ヿ㐀-䶿一-鿿豈-﫿\U00020000-\U0003ffff])")


def rouge_l(generated: str, target: str) -> float:
    """Return the Rouge-L F-measure of one text against one target, between 0 and 1."""
    # Naming the key matters: torchmetrics' default keys include one that downloads a sentence splitter.
    scores = rouge_score(generated, target, rouge_keys="rougeL", normalizer=str, tokenizer=words)
    return float(scores["rougeL_fmeasure"])


def words(text: str) -> list[str]:
    """Return the lower-case words of a text: runs of letters, marks and digits of any script."""
    spaced = _CHARACTER_WORDS.sub(r" \1 ", unicodedata.normalize("NFC", text.lower()))
    return "".join(character if unicodedata.category(character)[0] in "LMN" else " " for character in spaced).split()
