"""Hold inputs that are tokenised already, such as those that stored experts keep, in the place of task files."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

from modular_experts.data.batch import Example, Tokens, fitted
from modular_experts.data.mixture import TaskMixture
from modular_experts.data.rows import spread_evenly
from modular_experts.data.sources import TaskSource
from modular_experts.data.tasks import Task
from modular_experts.library import StoredExpert
from modular_experts.library.kept_inputs import Prompt


def as_prompts(examples: Mapping[str, Sequence[Example]]) -> dict[str, list[Prompt]]:
    """Return the prompts of each task's examples, without their targets."""
    return {
        task: [Prompt(row.tokens.ids[: row.tokens.prompt], -1 if row.end is None else row.end) for row in rows]
        for task, rows in examples.items()
    }


class _InputsAlone(TaskSource):
    """The source of a task that has inputs and no targets."""

    def rows(self) -> Iterator[Mapping[str, object]]:
        raise ValueError("this task has inputs alone, and its targets are needed; give its rows: `tasks=`")


class Inputs(TaskMixture):
    """Inputs of tasks, without targets, for every split alike.

    Args:
        prompts: The inputs of each task.
        **settings: Arguments of `TaskMixture`.
    """

    def __init__(self, prompts: Mapping[str, Sequence[Prompt]], **settings: Any) -> None:
        self.prompts = prompts
        super().__init__([Task(name=task, source=_InputsAlone()) for task in prompts], **settings)

    @property
    def classes(self) -> dict[str, list[str]]:
        """Nothing: inputs name no classes, so a classifier trains the heads that it has."""
        return {}

    @classmethod
    def kept_by(cls, experts: Sequence[StoredExpert]) -> Self:
        """Take the inputs that experts keep (`fit(..., keep_inputs=256)`); raise ValueError if one keeps none."""
        if lacking := [str(expert.place) for expert in experts if not expert.keeps_inputs]:
            raise ValueError(
                f"no rows are given, and {len(lacking)} of {len(experts)} experts keep no inputs, such as {lacking[0]}"
                "; give the tasks (`tasks=['a.jsonl', 'b.jsonl']`), or train with fit `keep_inputs=256`"
            )
        kept: dict[str, list[Prompt]] = {}
        for expert in experts:
            for task, prompts in expert.inputs().items():
                kept.setdefault(task, []).extend(prompts)
        return cls(kept)

    @classmethod
    def read_from(cls, data: TaskMixture, splits: Sequence[str], most: int) -> Self:
        """Take at most `most` inputs of each held-in task of a mixture, which has a tokenizer."""
        examples = {task: spread_evenly(rows, most) for task, rows in data.input_examples(splits).items()}
        return cls(
            as_prompts(examples),
            tokenizer=data.tokenizer,
            max_length=data.max_length,
            eval_batch_size=data.eval_batch_size,
        )

    def part(self, held: bool, every: int = 4) -> "Inputs":
        """Return every fourth input of each task if `held`, and the others if not."""
        parts = {
            task: [prompt for number, prompt in enumerate(prompts) if (number % every == every - 1) == held]
            for task, prompts in self.prompts.items()
        }
        if few := [task for task, part in parts.items() if not part]:
            raise ValueError(f"{few[0]} has {len(self.prompts[few[0]])} inputs; a fourth needs at least {every}")
        return Inputs(parts, tokenizer=self.tokenizer, max_length=self.max_length, eval_batch_size=self.eval_batch_size)

    def input_examples(self, splits: Sequence[str]) -> dict[str, list[Example]]:
        """Return at most `eval_limit` inputs of each task, the last tokens of those that are too long."""
        tokenizer = self.row_tokenizer().tokenizer
        size = len(tokenizer)
        examples: dict[str, list[Example]] = {}
        for task in self.roles:
            rows = examples[task] = []
            for ids, end in spread_evenly(self.prompts[task], self.eval_limit or len(self.prompts[task])):
                if ids.max() >= size:
                    raise ValueError(f"the inputs of {task} hold the token {ids.max()}, which the tokenizer lacks")
                kept = fitted(ids, 0, self.longest)
                text = str(tokenizer.decode(kept))
                tokens = Tokens(kept, len(kept))
                rows.append(Example(task, text, None, tokens, end=None if end < 0 else end, number=len(rows)))
        return examples
