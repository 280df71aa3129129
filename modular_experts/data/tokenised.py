"""Read the rows of tasks and tokenise them, each once; `mixture.py` makes batches of them.

What happens when:

1. An object is made: nothing is read.
2. `take_tokenizer` and `fit_context` tell how the model reads rows, as soon as the base and the model are known.
3. `rows` reads the files of all tasks, checks every row, and divides the rows among splits. They are kept until a stage
   of the trainer needs rows of another kind (`read_targets`).
4. `examples` tokenises the rows of one split. Examples are kept until the rows or the tokenizer change, one list for
   each setting that they depend on (`ExamplesKey`), so that a setting may change and change back.
"""

import copy
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import NamedTuple, NotRequired, Self, TypedDict

from lightning.pytorch import Trainer
from transformers import PreTrainedTokenizerBase

from modular_experts.base import Base
from modular_experts.data.batch import DataSource, Example
from modular_experts.data.chat import classifies, template_hash
from modular_experts.data.demonstrations import drawn, labels_of
from modular_experts.data.row_tokenizer import RowTokenizer
from modular_experts.data.rows import SPLITS, Message, Row, content_hash, raise_for_bad_rows, spread_evenly
from modular_experts.data.tasks import Task, Tasks, as_tasks, fill_splits, warn_of_repeats
from modular_experts.injection import context_length

log = logging.getLogger(__name__)


class ReadingFacts(TypedDict):
    """How rows become tokens.

    Attributes:
        max_length: The most tokens of a row.
        chat_template: Hash of the chat template; None without one.
        shots: Demonstrations before each row, if there are any.
    """

    max_length: int
    chat_template: str | None
    shots: NotRequired[int]


class TaskContents(TypedDict):
    """What a record keeps of a task: how many rows each split has, and the hash of all rows."""

    rows: dict[str, int]
    hash: str


@dataclass
class TaskRows:
    """All rows of one task, each with a split."""

    rows: list[Row]

    @cached_property
    def contents(self) -> TaskContents:
        """What a record keeps of them."""
        return {"rows": dict(Counter(str(row.split) for row in self.rows)), "hash": content_hash(self.rows)}


class ExamplesKey(NamedTuple):
    """What a list of examples depends on, beside the tokenizer.

    Attributes:
        task: The name of the task.
        kind: The split, or which inputs.
        limit: `eval_limit`, which leaves training rows alone; None for these.
        longest: The most tokens of a row.
        learns_choices: Whether training rows carry their choices.
        chat_template: Whether inputs go through the chat template.
        shots, shots_seed, label_choices: As for `TaskMixture`.
    """

    task: str
    kind: str
    limit: int | None
    longest: int
    learns_choices: bool
    chat_template: bool
    shots: int
    shots_seed: int
    label_choices: bool


class TaskExamples(NamedTuple):
    """The tokenised rows of one task, and how many of them were cut."""

    examples: list[Example]
    cut: int


class SplitSize(NamedTuple):
    """The rows of one task and split, their tokens, and how many rows were cut to `max_length`."""

    task: str
    role: str
    split: str
    rows: int
    tokens: int
    truncated: int


class TokenisedTasks(DataSource):
    """The rows of tasks as a model reads them; `TaskMixture` describes the settings."""

    def __init__(
        self,
        tasks: Tasks,
        tokenizer: str | PreTrainedTokenizerBase | None,
        max_length: int,
        chat_template: bool,
        eval_limit: int | None,
        validation_ratio: float,
        test_ratio: float,
        split_seed: int,
        shots: int = 0,
        shots_seed: int = 0,
        label_choices: bool = False,
    ) -> None:
        if min(validation_ratio, test_ratio) < 0 or validation_ratio + test_ratio >= 1:
            raise ValueError(f"{validation_ratio=} and {test_ratio=} must be 0 or more and leave rows to train on")
        self.tasks = as_tasks(tasks)
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.chat_template = chat_template
        self.eval_limit = eval_limit
        self.validation_ratio = validation_ratio
        self.test_ratio = test_ratio
        self.split_seed = split_seed
        if shots < 0:
            raise ValueError(f"{shots=} must be 0 or more demonstrations before each row")
        self.shots = shots
        self.shots_seed = shots_seed
        self.label_choices = label_choices
        self.trainer: Trainer | None = None
        self.context: int | None = None
        """How many tokens of a row the model can read, where a model is known (`fit_context`)."""
        self.said: list[str] = []
        """Sentences on how the rows were read."""
        self._learns_choices = False
        self._needs_targets = True
        self._lender: Path | None = None
        self._borrowed: PreTrainedTokenizerBase | None = None
        # The mixtures that `only` returns share these two.
        self._rows: dict[str, TaskRows] = {}
        self._examples: dict[ExamplesKey, TaskExamples] = {}

    def take_tokenizer(self, base: str | Path | Base, revision: str | None = None) -> PreTrainedTokenizerBase:
        """Read rows with the tokenizer of a base, unless the mixture was given one; return what reads them."""
        if self.tokenizer is self._borrowed:
            opened = Base.open(base, revision=revision)
            if opened.directory != self._lender:
                self._lender = opened.directory
                self.tokenizer = self._borrowed = opened.tokenizer()
                self._examples = {}
        return self.row_tokenizer().tokenizer

    def read_for(self, base: Base) -> None:
        """Read rows as a base does that is not loaded: with its tokenizer, unless given one, and within its context."""
        self.take_tokenizer(base)
        self.fit_context(context_length(base.structure.model))

    def fit_context(self, context: int | None) -> None:
        """Cut rows to the context of the model, as a shorter `max_length` would; None for one without a limit."""
        self.context = context

    def learn_choices(self, learns: bool = True) -> None:
        if learns and not self._learns_choices:
            for name, rows in [*self.rows("train").items(), *self.rows("validation").items()]:
                if not all(row.choices for row in rows):
                    raise ValueError(
                        f"a loss of preferences compares answers, and rows of {name} have one each; give rows of "
                        "prompt, chosen and rejected, or of input, target and choices"
                    )
        self._learns_choices = learns

    def read_targets(self, needed: bool) -> None:
        """Tell whether every row needs a target, as all but predictions do; rows of the other kind are read again."""
        if needed != self._needs_targets:
            self._needs_targets = needed
            self._rows = {}
            self._examples = {}

    @property
    def longest(self) -> int:
        """The most tokens of a row: `max_length`, or the context where it is shorter."""
        return self.max_length if self.context is None else min(self.max_length, self.context)

    @property
    def roles(self) -> dict[str, str]:
        """Each task's role, `held_in` or `held_out`, by name, in the order of the tasks."""
        return {task.name: task.role for task in self.tasks}

    def only(self, names: Sequence[str]) -> Self:
        """Return the mixture of some of the tasks, in the given order.

        Both mixtures share the rows that either has read and tokenised, so change no setting of one but `eval_limit`,
        `chat_template` and `shots`.
        """
        by_name = {task.name: task for task in self.tasks}
        part = copy.copy(self)
        part.tasks = [by_name[name] for name in names]
        return part

    def of_rows(self, rows: Mapping[str, Sequence[Row]]) -> Self:
        """Return the mixture of some rows of these tasks, which have their splits already."""
        part = self.only(list(rows))
        part.trainer = None
        part.eval_limit = None
        part._rows = {name: TaskRows(list(own)) for name, own in rows.items()}
        part._examples = {}
        return part

    def reading_of(self, tasks: Iterable[str]) -> ReadingFacts:
        """Return how rows of some tasks, or of all if it has none of these, become tokens."""
        read = self._read()
        asked = [read[task] for task in tasks if task in read] or list(read.values())
        is_chat = self.chat_template or any(task.rows and task.rows[0].messages for task in asked)
        template = template_hash(self.row_tokenizer().tokenizer) if is_chat else None
        facts: ReadingFacts = {"max_length": self.max_length, "chat_template": template}
        if self.shots:
            facts["shots"] = self.shots
        return facts

    @property
    def contents(self) -> dict[str, TaskContents]:
        """The rows of each held-in task by split, and the hash of their contents."""
        return {name: task.contents for name, task in self._read().items() if self.roles[name] == "held_in"}

    def rows(self, split: str) -> dict[str, list[Row]]:
        """Return the rows of one split by task: all training rows, or at most `eval_limit` others of a task."""
        limited = {}
        read = self._read()
        for task in self._tasks_with(split):
            rows = [row for row in read[task.name].rows if row.split == split]
            limited[task.name] = spread_evenly(rows, self._limit(split) or len(rows))
        return limited

    def examples(self, split: str) -> dict[str, list[Example]]:
        """Return the tokenised rows of one split by task, as `rows`."""
        keys = {task.name: self._key(task.name, split) for task in self._tasks_with(split)}
        if not all(key in self._examples for key in keys.values()):
            self._tokenise(split, self.rows(split))
        return {name: self._examples[key].examples for name, key in keys.items()}

    def sizes(self) -> list[SplitSize]:
        """Return the rows and tokens of each task and split that has rows; held-out tasks have only test rows."""
        sizes = []
        for name, role in self.roles.items():
            for split in SPLITS:
                rows = self.examples(split).get(name)
                if rows:
                    tokens = sum(len(row.tokens.ids) for row in rows)
                    cut = self._examples[self._key(name, split)].cut
                    sizes.append(SplitSize(name, role, split, len(rows), tokens, cut))
        return sizes

    def validation_examples(self, targets: bool = True) -> dict[str, list[Example]]:
        """Return the validation rows of each held-in task; without targets, as `input_examples` gives them."""
        if not targets:
            return self.input_examples(["validation"])
        self.read_targets(True)
        self.need_rows("validation")
        return self.examples("validation")

    def need_rows(self, split: str) -> None:
        """Tokenise the rows of a split; raise ValueError if a task that needs some has none."""
        examples = self.examples(split)
        if not examples:
            raise ValueError(f"there are no {split} rows: all of {', '.join(self.roles)} are held out")
        for name, rows in examples.items():
            if not rows:
                counts = Counter(row.split for row in self._read()[name].rows)
                has = ", ".join(f"{count} {known}" for known, count in counts.items())
                raise ValueError(
                    f"task {name!r} has no {split} rows, only {has}; give some of its rows the split {split!r}"
                )

    def input_examples(self, splits: Sequence[str]) -> dict[str, list[Example]]:
        """Return rows of each held-in task as inputs without targets or choices; rows need no target.

        One with neither target nor split counts as a validation row. `eval_limit` holds where no training rows are
        asked for.
        """
        which = " or ".join(splits)
        kind = f"inputs of {which}"
        asked: dict[str, list[Row]] = {}
        problems: list[str] = []
        keys = {task.name: self._key(task.name, kind) for task in self.tasks if task.held_in}
        for task in self.tasks:
            if not task.held_in or keys[task.name] in self._examples:
                continue
            rows, bad = task.read(targets=False)
            problems += bad
            rows = [row if row.target or row.split else replace(row, split="validation") for row in rows]
            rows = [row for row in self._divided(task, rows) if row.split in splits]
            if not (rows or bad):
                raise ValueError(f"task {task.name!r} has no {which} rows; give some rows the split {splits[-1]!r}")
            limited = spread_evenly(rows, self._limit(kind) or len(rows))
            asked[task.name] = [_without_target(row) for row in limited]
        raise_for_bad_rows(problems)
        self._tokenise(kind, asked)
        return {name: self._examples[key].examples for name, key in keys.items()}

    def inputs(self, most: int) -> dict[str, list[Example]]:
        """Return at most `most` training examples of all tasks together, spread evenly over them."""
        by_task: dict[str, list[Example]] = {}
        for example in spread_evenly(list(chain.from_iterable(self.examples("train").values())), most):
            by_task.setdefault(example.task, []).append(example)
        return by_task

    def row_tokenizer(self) -> RowTokenizer:
        """Return what makes tokens of rows by these settings."""
        if self.tokenizer is None:
            raise ValueError("the task mixture has no tokenizer; set data.tokenizer to the model's directory or hub id")
        if isinstance(self.tokenizer, str):
            self.tokenizer = Base.open(self.tokenizer).tokenizer()
        return RowTokenizer(self.tokenizer, self.max_length, self.chat_template, self.context, self._learns_choices)

    def _read(self) -> dict[str, TaskRows]:
        problems = []
        for task in (task for task in self.tasks if task.name not in self._rows):
            rows, bad = task.read(self._needs_targets, self._log)
            problems += bad
            if not bad:
                divided = self._divided(task, rows)
                self._rows[task.name] = TaskRows(divided)
                if self.trainer is None or self.trainer.is_global_zero:
                    warn_of_repeats(task.name, divided)
        raise_for_bad_rows(problems)
        return {task.name: self._rows[task.name] for task in self.tasks}

    def _tokenise(self, kind: str, rows: Mapping[str, Sequence[Row]]) -> None:
        """Tokenise the rows of those tasks of which no such examples are kept."""
        tokenize = self.row_tokenizer()
        problems = []
        for name, own in rows.items():
            key = self._key(name, kind)
            if key in self._examples:
                continue
            learn = kind == "train"
            if self.shots and learn and own and own[0].messages:
                raise ValueError(
                    f"{name}: all turns of a conversation are learned, and demonstrations would be, too; leave "
                    f"shots={self.shots} out, or give rows of input and target"
                )
            examples, cut, bad = tokenize(
                name, self._with_labels(name, own, learn), learn, self.demonstrations(name, own)
            )
            problems += bad
            if self.shots and examples and not own[0].messages:
                self._log_shots(name, kind, [example.shots for example in examples], tokenize.limit)
            if cut:
                which = f"{cut} of {len(own)} {kind} rows are longer than {tokenize.limit}"
                side = "end" if classifies(tokenize.tokenizer) else "start"
                self._log(f"{name}: {which} and lost their {side}", logging.WARNING)
            if not bad:
                self._examples[key] = TaskExamples(examples, cut)
        raise_for_bad_rows(problems)

    def training_rows(self, task: str) -> list[Row]:
        """Return the training rows of a task that have a target, whatever its role."""
        return [row for row in self._read()[task].rows if row.split == "train" and row.target is not None]

    @property
    def classes(self) -> dict[str, list[str]]:
        """The targets of all rows of each held-in task, sorted: the classes that a classifier learns."""
        held_in = [task.name for task in self.tasks if task.held_in]
        rows = self._read()
        return {name: sorted({row.target for row in rows[name].rows if row.target is not None}) for name in held_in}

    def demonstrations(self, task: str, rows: Sequence[Row]) -> list[list[Row]]:
        """Return the training rows that stand before each of a task's rows; an empty list without `shots`."""
        if not self.shots:
            return []
        training = self.training_rows(task)
        if not training:
            raise ValueError(
                f"task {task!r} has no training rows for shots={self.shots} to show before each row; give some of its "
                "rows the split 'train'"
            )
        return drawn(rows, training, self.shots, self.shots_seed)

    def prompt_behind_demonstrations(self, text: str) -> list[int]:
        """Return the tokens of a prompt that is in no row, behind `shots` training rows of the one task."""
        if len(self.tasks) != 1 or not self.shots:
            given = f"tasks={', '.join(self.roles)} and shots={self.shots}"
            raise ValueError(f"{given}: demonstrations before a prompt come from one task; name one, with shots=4")
        (task,) = self.roles
        asked: tuple[Message, ...] = ({"role": "user", "content": text},)
        is_talk = any(row.messages for row in self.training_rows(task))
        row = Row(text, None, where="the prompt", messages=asked if is_talk else ())
        examples, _, problems = self.row_tokenizer()(task, [row], demonstrations=self.demonstrations(task, [row]))
        raise_for_bad_rows(problems)
        tokens = examples[0].tokens
        return tokens.ids[: tokens.prompt].tolist()

    def _with_labels(self, task: str, rows: Sequence[Row], learn: bool) -> Sequence[Row]:
        """Return the rows that have no choices with the labels of the task's training rows in their place."""
        if not self.label_choices or learn or any(row.choices or row.messages for row in rows):
            return rows
        labels = labels_of(self.training_rows(task))
        if not labels:
            self._log(f"{task}: the targets of its training rows do not come again, so they are not compared as labels")
        return [row if row.target is None else replace(row, choices=labels) for row in rows]

    def _log_shots(self, task: str, kind: str, shots: Sequence[int], limit: str) -> None:
        """Say how many demonstrations rows have."""
        self._log(f"{task}: {max(shots)} demonstrations stand before each of {len(shots)} {kind} rows")
        if fewer := sum(count < self.shots for count in shots):
            sentence = f"{fewer} of {len(shots)} {kind} rows have fewer than {self.shots} demonstrations"
            why = f"others leave no room in {limit}, or there are no other training rows"
            self._log(f"{task}: {sentence}, down to {min(shots)}: {why}", logging.WARNING)

    def _key(self, task: str, kind: str) -> ExamplesKey:
        return ExamplesKey(
            task,
            kind,
            self._limit(kind),
            self.longest,
            self._learns_choices,
            self.chat_template,
            self.shots,
            self.shots_seed,
            self.label_choices,
        )

    def _limit(self, kind: str) -> int | None:
        return None if "train" in kind else self.eval_limit

    def _tasks_with(self, split: str) -> list[Task]:
        """Return the tasks that have rows of a split: held-out ones have only test rows."""
        return [task for task in self.tasks if split == "test" or task.held_in]

    def _divided(self, task: Task, rows: Sequence[Row]) -> list[Row]:
        return fill_splits(rows, self.validation_ratio, self.test_ratio, self.split_seed, task.held_in)

    def _log(self, sentence: str, level: int = logging.INFO) -> None:
        if self.trainer is None or self.trainer.is_global_zero:
            self.said.append(sentence)
            log.log(level, sentence)


def _without_target(row: Row) -> Row:
    messages = row.messages[:-1] if row.target else row.messages
    return replace(row, target=None, choices=(), answers=(), messages=messages)
