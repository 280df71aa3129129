"""Score tasks by sums over rows, so that any division into batches and processes gives the same result."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from modular_experts.data.batch import Batch, is_filler
from modular_experts.evaluation.metrics import TEXT_METRICS, TextMetric
from modular_experts.reports.results import MutableFacts


class TaskScores(Metric):
    """Scores by task.

    Args:
        tasks: Each task's role, `held_in` or `held_out`, by name.
        metrics: The text metrics by name; `TEXT_METRICS | {"length": lambda text, target: len(text)}` adds one.
    """

    full_state_update = False

    def __init__(self, tasks: Mapping[str, str], metrics: Mapping[str, TextMetric] = TEXT_METRICS) -> None:
        super().__init__()
        self.roles = dict(tasks)
        self.metrics = dict(metrics)
        self._by_row: dict[str, dict[int, dict[str, float]]] = {name: defaultdict(dict) for name in tasks}
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
        place_of = {name: place for place, name in enumerate(self.roles)}
        rows = [row for row, filler in enumerate(is_filler(batch)) if not filler]
        tasks = torch.tensor([place_of[batch["task"][row]] for row in rows], dtype=torch.int64)
        # Processes exchange all sums, also those to which a process has nothing to add.
        for name in self.divisors:
            self._add(f"{name}_sum", tasks[:0], torch.zeros(0))
        self._keep(batch, rows, loss=token_loss_sums[rows].tolist(), tokens=token_counts[rows].tolist())
        self._add("rows_count", tasks, torch.ones(len(rows)))
        self._add("loss_sum", tasks, token_loss_sums[rows])
        self._add("tokens_count", tasks, token_counts[rows])
        if generations is not None:
            self._add("generated_count", tasks, torch.ones(len(rows)))
            for name, metric in self.metrics.items():
                values = [metric(generations[row], batch["target"][row]) for row in rows]
                self._keep(batch, rows, **{name: values})
                self._add(f"{name}_sum", tasks, torch.tensor(values, dtype=torch.float64))
        if cut is not None:
            self._add("cut_count", tasks, torch.tensor([cut[row] for row in rows], dtype=torch.int64))
        if choice_scores is not None and "choices" in batch:
            # The number of each row's likeliest choice, the first of equals.
            best: dict[int, int] = {}
            likelihoods = choice_scores.tolist()
            for choice, row in enumerate(batch["choices"]["row"].tolist()):
                if row not in best or likelihoods[choice] > likelihoods[best[row]]:
                    best[row] = choice
            tasks = torch.tensor([place_of[batch["task"][row]] for row in best], dtype=torch.int64)
            right = [float(batch["choices"]["correct"][choice]) for choice in best.values()]
            self._keep(batch, best, choice_accuracy=right)
            self._add("chosen_count", tasks, torch.ones(len(best)))
            self._add("choice_accuracy_sum", tasks, torch.tensor(right, dtype=torch.float64))

    def compute(self) -> MutableFacts:
        """Return the scores: "tasks" by name, and "held_in" and "held_out", unweighted means over tasks that have rows.

        Exact match, Rouge-L and choice accuracy are shares between 0 and 1; the loss is in nats per target token,
        end-of-sequence included. Afterwards `cut` has the number of answers of each task that the context ended.
        """
        self.cut = {name: int(self.cut_count[index]) for index, name in enumerate(self.roles)}  # type: ignore[index]
        tasks: dict[str, MutableFacts] = {}
        for index, (name, role) in enumerate(self.roles.items()):
            rows = int(self.rows_count[index])  # type: ignore[index]
            if not rows:
                continue
            tasks[name] = {"role": role, "rows": rows}
            for score, divisor in self.divisors.items():
                count = int(getattr(self, f"{divisor}_count")[index])
                if count:
                    tasks[name][score] = float(getattr(self, f"{score}_sum")[index]) / count
        means = {}
        for role in ("held_in", "held_out"):
            mine = [scores for scores in tasks.values() if scores["role"] == role]
            measured = {name: [scores[name] for scores in mine if name in scores] for name in self.divisors}
            means[role] = {name: sum(values) / len(values) for name, values in measured.items() if values}
        return {"tasks": tasks, **means}

    def values(self) -> dict[str, dict[str, list[float]]]:
        """Return each score of every row by task, in the order of a task's rows; the `loss` is a sum over `tokens`.

        A process knows the rows that it has counted itself.
        """
        by_task: dict[str, dict[str, list[float]]] = {name: {} for name in self._by_row}
        for name, rows in self._by_row.items():
            for number in sorted(rows):
                for score, value in rows[number].items():
                    by_task[name].setdefault(score, []).append(round(value, 6))
        return by_task

    def _keep(self, batch: Batch, rows: Iterable[int], **scores: Sequence[float]) -> None:
        """Keep scores of some rows of a batch, if its rows have numbers."""
        if "number" not in batch:
            return
        for place, row in enumerate(rows):
            own = {name: float(values[place]) for name, values in scores.items()}
            self._by_row[batch["task"][row]][batch["number"][row]] |= own

    def _add(self, name: str, tasks: Tensor, values: Tensor) -> None:
        state = getattr(self, name)
        if state.is_floating_point() and state.device.type != "mps":  # which has no float64
            state = state.double()  # also undoes a module.to(bfloat16), which reaches a metric that is still zero
        setattr(self, name, state.index_add(0, tasks.to(state.device), values.detach().to(state)))
