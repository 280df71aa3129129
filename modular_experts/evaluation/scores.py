"""Score tasks by sums over rows, so that any division into batches and processes gives the same result."""

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.text.rouge import rouge_score

from modular_experts.data.batch import Batch, is_filler

TextMetric = Callable[[str, str], float]
"""Scores a generated text against its target; the mean over the rows of a task is its score."""

# Scripts without spaces between words: each character is a word (kana, Han, and Han's extensions).
_CHARACTER_WORDS = re.compile(r"([぀-ヿ㐀-䶿一-鿿豈-﫿\U00020000-\U0003ffff])")


def exact_match(generated: str, target: str) -> float:
    """Return 1.0 if both texts are the same but for white space at their ends, else 0.0."""
    return float(generated.strip() == target.strip())


# Merges of the same experts give many rows the same answer, and a study asks again for each row's value.
@lru_cache(2**14)
def rouge_l(generated: str, target: str) -> float:
    """Return the Rouge-L F-measure of one text against one target, between 0 and 1."""
    return _rouge_l(generated, target)


@lru_cache(2**14)
def stemmed_rouge_l(generated: str, target: str) -> float:
    """Return Rouge-L over the stems of English words (Porter's), as the evaluation of arXiv 2507.07140 takes it.

    Words of up to three letters stay as they are. It needs nltk: `pip install 'modular-experts[rouge]'`.
    """
    try:
        return _rouge_l(generated, target, use_stemmer=True)
    except ModuleNotFoundError as error:
        raise ValueError(
            "stemmed_rouge_l needs nltk, which is not installed: pip install 'modular-experts[rouge]'"
        ) from error


def _rouge_l(generated: str, target: str, use_stemmer: bool = False) -> float:
    # Naming the key matters: torchmetrics' default keys include one that downloads a sentence splitter.
    scores = rouge_score(
        generated, target, use_stemmer=use_stemmer, rouge_keys="rougeL", normalizer=str, tokenizer=words
    )
    return float(scores["rougeL_fmeasure"])


def words(text: str) -> list[str]:
    """Return the lower-case words of a text: runs of letters, marks and digits of any script."""
    spaced = _CHARACTER_WORDS.sub(r" \1 ", unicodedata.normalize("NFC", text.lower()))
    return "".join(character if unicodedata.category(character)[0] in "LMN" else " " for character in spaced).split()


TEXT_METRICS: dict[str, TextMetric] = {"exact_match": exact_match, "rougeL": rouge_l}


def text_metrics(own: Mapping[str, TextMetric] | None) -> dict[str, TextMetric]:
    """Return exact match and Rouge-L with one's own metrics beside them, or in their place where a name is theirs."""
    for name, metric in (own or {}).items():
        value = metric("one answer", "one answer")
        if not isinstance(value, int | float):
            raise ValueError(f"metrics.{name} returned {value!r} for two texts; a metric must return a number")
    return {**TEXT_METRICS, **(own or {})}


class TaskScores(Metric):
    """Scores by task.

    Args:
        tasks: Each task's role, `held_in` or `held_out`, by name.
        metrics: The text metrics by name; `TEXT_METRICS | {"length": lambda text, target: len(text)}` adds one.
    """

    full_state_update = False

    def __init__(self, tasks: Mapping[str, str], metrics: Mapping[str, TextMetric] = TEXT_METRICS) -> None:
        super().__init__()
        self.roles, self.metrics = dict(tasks), dict(metrics)
        #: Each score, and the count that divides its sum.
        self.divisors = {"loss": "tokens", **dict.fromkeys(self.metrics, "generated"), "choice_accuracy": "chosen"}
        for name in self.divisors:
            self.add_state(f"{name}_sum", torch.zeros(len(tasks)), dist_reduce_fx="sum")
        for name in ("rows", "tokens", "generated", "chosen", "cut"):
            self.add_state(f"{name}_count", torch.zeros(len(tasks), dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self,
        batch: Batch,
        token_loss_sums: Tensor,
        token_counts: Tensor,
        generations: Sequence[str] | None = None,
        choice_scores: Tensor | None = None,
        cut: Sequence[bool] | None = None,
    ) -> None:
        """Count one batch of `n` rows with texts, filler rows left out.

        Args:
            token_loss_sums: `(n,)` from `batch_losses`.
            token_counts: `(n,)` from `batch_losses`.
            generations: The text that the model generated for each row.
            choice_scores: `(m,)` from `choice_log_likelihoods`, one per choice of the batch.
            cut: Which answers the model's context ended (`cut_answers`).
        """
        number = {name: index for index, name in enumerate(self.roles)}
        rows = [row for row, filler in enumerate(is_filler(batch)) if not filler]
        tasks = torch.tensor([number[batch["task"][row]] for row in rows], dtype=torch.int64)
        self._add("rows_count", tasks, torch.ones(len(rows)))
        self._add("loss_sum", tasks, token_loss_sums[rows])
        self._add("tokens_count", tasks, token_counts[rows])
        if generations is not None:
            self._add("generated_count", tasks, torch.ones(len(rows)))
            for name, metric in self.metrics.items():
                values = [metric(generations[row], batch["target"][row]) for row in rows]
                self._add(f"{name}_sum", tasks, torch.tensor(values, dtype=torch.float64))
        if cut is not None:
            self._add("cut_count", tasks, torch.tensor([cut[row] for row in rows], dtype=torch.int64))
        if choice_scores is not None and "choices" in batch:
            # The place of each row's likeliest choice, the first of equals.
            best: dict[int, int] = {}
            values = choice_scores.tolist()
            for place, row in enumerate(batch["choices"]["row"].tolist()):
                if row not in best or values[place] > values[best[row]]:
                    best[row] = place
            of = torch.tensor([number[batch["task"][row]] for row in best], dtype=torch.int64)
            right = [float(batch["choices"]["correct"][place]) for place in best.values()]
            self._add("chosen_count", of, torch.ones(len(best)))
            self._add("choice_accuracy_sum", of, torch.tensor(right, dtype=torch.float64))

    def compute(self) -> dict[str, Any]:
        """Return the scores: "tasks" by name, and "held_in" and "held_out", unweighted means over tasks that have rows.

        Exact match, Rouge-L and choice accuracy are shares between 0 and 1; the loss is in nats per target token,
        end-of-sequence included. Afterwards `cut` has the number of answers of each task that the context ended.
        """
        self.cut = {name: int(self.cut_count[index]) for index, name in enumerate(self.roles)}  # type: ignore[index]
        tasks = {}
        for index, (name, role) in enumerate(self.roles.items()):
            found: dict[str, Any] = {"role": role, "rows": int(self.rows_count[index])}  # type: ignore[index]
            for score, divisor in self.divisors.items():
                count = int(getattr(self, f"{divisor}_count")[index])
                if count:
                    found[score] = float(getattr(self, f"{score}_sum")[index]) / count
            if found["rows"]:
                tasks[name] = found
        means = {}
        for role in ("held_in", "held_out"):
            mine = [scores for scores in tasks.values() if scores["role"] == role]
            measured = {name: [scores[name] for scores in mine if name in scores] for name in self.divisors}
            means[role] = {name: sum(values) / len(values) for name, values in measured.items() if values}
        return {"tasks": tasks, **means}

    def _add(self, name: str, tasks: Tensor, values: Tensor) -> None:
        state = getattr(self, name)
        if state.is_floating_point() and state.device.type != "mps":  # which has no float64
            state = state.double()  # also undoes a module.to(bfloat16), which reaches a metric that is still zero
        tasks, values = tasks.to(state.device), values.detach().to(state)
        setattr(self, name, state.index_add(0, tasks, values))
