"""Take the inputs that stored experts keep for the rows of their tasks, where no task files are at hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from modular_experts.data.batch import Example, Tokens, fitted
from modular_experts.data.mixture import TaskMixture
from modular_experts.data.rows import spread_evenly
from modular_experts.data.sources import TaskSource
from modular_experts.data.tasks import Task
from modular_experts.library import StoredExpert
from modular_experts.library.inputs import Prompt


class _InputsAlone(TaskSource):
    """The source of a task of which inputs alone are there."""

    def rows(self) -> Iterator[Mapping[str, Any]]:
        raise ValueError("of this task only inputs are there, and this needs targets; give its rows: --data.tasks")


class KeptInputs(TaskMixture):
    """The inputs that experts keep (`fit --keep_inputs`), as the inputs of all splits of their tasks.

    Args:
        experts: Stored experts, each with inputs.
        **settings: Arguments of `TaskMixture`.

    Raises:
        ValueError: An expert keeps no inputs.
    """

    def __init__(self, experts: Sequence[StoredExpert], **settings: Any) -> None:
        if lacking := [str(expert.path) for expert in experts if not expert.keeps_inputs]:
            raise ValueError(
                f"no rows are given, and {len(lacking)} of {len(experts)} experts keep no inputs, such as {lacking[0]}"
                "; give the tasks (--data.tasks a.jsonl b.jsonl), or train with fit --keep_inputs 256"
            )
        self._kept: dict[str, list[Prompt]] = {}
        for expert in experts:
            for task, prompts in expert.inputs().items():
                self._kept.setdefault(task, []).extend(prompts)
        super().__init__([Task(name=task, source=_InputsAlone()) for task in self._kept], **settings)

    def input_examples(self, splits: Sequence[str]) -> dict[str, list[Example]]:
        """Return at most `eval_limit` inputs of each task, the last tokens of those that are too long."""
        tokenizer: Any = self._row_tokenizer().tokenizer
        found: dict[str, list[Example]] = {}
        for task in self.roles:
            for ids, end in spread_evenly(self._kept[task], self.eval_limit or len(self._kept[task])):
                if ids.max() >= len(tokenizer):
                    raise ValueError(f"the inputs of {task} hold the token {ids.max()}, which the tokenizer lacks")
                kept, end_id = fitted(ids, 0, self.longest), None if end < 0 else end
                rows = found.setdefault(task, [])
                text = tokenizer.decode(kept, skip_special_tokens=False)
                rows.append(Example(task, text, None, Tokens(kept, len(kept)), end=end_id, number=len(rows)))
        return found
