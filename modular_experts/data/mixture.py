"""Turn tasks into batches, as a LightningDataModule; a loader only pads rows that are tokenised already."""

import copy
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from modular_experts.base import Base
from modular_experts.data.batch import LITTLE_PADDING, Collator, DataSource, Example, ExampleSet, packs
from modular_experts.data.chat import template_hash
from modular_experts.data.rows import SPLITS, Row, content_hash, raise_for_bad_rows, spread_evenly
from modular_experts.data.sampler import (
    EvaluationSampler,
    Mixing,
    MixtureSampler,
    Proportional,
    ResumableLoader,
    epoch_counts,
    epoch_order,
    next_batch,
    seed_of_run,
)
from modular_experts.data.tasks import Task, Tasks, as_tasks, fill_splits, warn_of_repeats
from modular_experts.data.tokenize import RowTokenizer
from modular_experts.injection import context_length

log = logging.getLogger(__name__)


class ExamplesKey(NamedTuple):
    """The settings on which tokenised rows depend.

    Attributes:
        kind: The split, or which inputs.
        limit: `eval_limit`, which leaves training rows alone; None for these.
        longest: The most tokens of a row.
        learns_choices: Whether training rows carry their choices.
    """

    kind: str
    limit: int | None
    longest: int
    learns_choices: bool


class SplitSize(NamedTuple):
    """The rows of one task and split, their tokens, and how many rows were cut to `max_length`."""

    task: str
    role: str
    split: str
    rows: int
    tokens: int
    truncated: int


class TaskMixture(LightningDataModule, DataSource):
    """Batches of one or more tasks.

    Args:
        tasks: Paths of task files, or tasks with settings: {path: intents.jsonl, role: held_out}. Rows have `input`,
            `target` and optionally `split` (train, validation or test) and `choices`, or another form of `Task`,
            such as `messages`.
        tokenizer: Model directory or hub id whose tokenizer is used, or a tokenizer; the one of the model that is
            trained or tested if not given.
        batch_size: Rows of a training batch, all processes together. Results do not depend on how many share it.
        eval_batch_size: Rows of a validation, test or prediction batch of one process; changes the speed only, but for
            a search of merging coefficients, each step of which takes one batch of every task.
        max_length: The most tokens of a row; longer rows lose tokens on the left of the input and keep their target. So
            do rows that are longer than the model's context.
        mixing: How much of each task an epoch takes: `Proportional` (the default), `Equal` or `Temperature`.
        seed: Seed of the order of training, together with the epoch; the run's own (`seed_everything`) if not given.
        validation_ratio: Share of a held-in task's rows without a `split` that go to validation.
        test_ratio: Share of a held-in task's rows without a `split` that go to the test; of held-out tasks all do.
        split_seed: Seed of this division, apart from `seed`, so that no test meets rows that another run trained on.
        eval_limit: The most validation rows, and the most test rows, of one task, spread evenly over its file.
        packing: Whether the rows of a training batch stand one behind the other, in sequences of at most `max_length`
            tokens, instead of each being padded; no row attends to another, so the loss is the same. If not given, rows
            are packed where more than a twentieth of the batches would be padding, the model keeps packed rows apart,
            and its experts are deltas; with true, a model that mixes rows is refused.
        chat_template: Put the input as a user's message through the tokenizer's chat template; `messages` always go
            through it.
    """

    def __init__(
        self,
        tasks: Tasks,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        batch_size: int = 8,
        eval_batch_size: int = 16,
        max_length: int = 1024,
        mixing: Mixing | None = None,
        seed: int | None = None,
        validation_ratio: float = 0.1,
        test_ratio: float = 0.1,
        split_seed: int = 0,
        eval_limit: int | None = None,
        chat_template: bool = False,
        packing: bool | None = None,
    ) -> None:
        super().__init__()
        sizes = {"batch_size": batch_size, "eval_batch_size": eval_batch_size, "eval_limit": eval_limit}
        for name, value in sizes.items():
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if min(validation_ratio, test_ratio) < 0 or validation_ratio + test_ratio >= 1:
            raise ValueError(f"{validation_ratio=} and {test_ratio=} must be 0 or more and leave rows to train on")
        self.tasks, self.tokenizer = as_tasks(tasks), tokenizer
        self.context: int | None = None
        """How many tokens of a row the model can read, where a model is known (`fit_context`)."""
        self.batch_size, self.eval_batch_size, self.max_length = batch_size, eval_batch_size, max_length
        self.mixing = Proportional() if mixing is None else mixing
        self.seed = seed
        self.split_seed, self.eval_limit, self.chat_template = split_seed, eval_limit, chat_template
        self.validation_ratio, self.test_ratio = validation_ratio, test_ratio
        self.packing, self.packed = packing, bool(packing)
        self._learns_choices = False
        self.said: list[str] = []
        """Sentences on how the rows were read."""
        self._predicts = False
        self._borrowed: tuple[Path | None, PreTrainedTokenizerBase | None] = None, None
        # What was read and tokenised, by task, which the mixtures that `only` returns share. Examples, and how many of
        # them were cut, also depend on settings (`_key`).
        self._rows: dict[str, list[Row]] = {}
        self._examples: dict[ExamplesKey, dict[str, list[Example]]] = {}
        self._truncated: Counter[tuple[str, ExamplesKey]] = Counter()

    def take_tokenizer(self, base: str | Path | Base, revision: str | None = None) -> PreTrainedTokenizerBase:
        """Read rows with the tokenizer of a base, unless the mixture was given one; return what reads them."""
        lender, borrowed = self._borrowed
        if self.tokenizer is borrowed and (opened := Base.open(base, revision=revision)).directory != lender:
            self.tokenizer = opened.tokenizer()
            self._borrowed = opened.directory, self.tokenizer
            self._examples, self._truncated = {}, Counter()
            self.__dict__.pop("_training_collator", None)
        return self.row_tokenizer().tokenizer

    def read_for(self, base: Base) -> None:
        """Read rows as a base does that is not loaded: with its tokenizer, unless given one, and within its context."""
        self.take_tokenizer(base)
        self.fit_context(context_length(base.structure.model))

    def fit_context(self, context: int | None) -> None:
        """Cut rows to the context of the model, as a shorter `max_length` would; None for one without a limit."""
        self.context = context

    def _key(self, kind: str) -> ExamplesKey:
        limit = None if "train" in kind else self.eval_limit
        return ExamplesKey(kind, limit, self.longest, self._learns_choices)

    def _known(self, kind: str) -> dict[str, list[Example]]:
        """Return the examples of some rows by task, also those of another length that no row reaches in either."""
        key = self._key(kind)
        known = self._examples.setdefault(key, {})
        # Rows that were read for another length serve again if neither length cuts any of them.
        others = [other for other in self._examples if other._replace(longest=self.longest) == key]
        for other in others:
            for name in self._examples[other].keys() - known.keys():
                examples = self._examples[other][name]
                tokens = (part for example in examples for part in (example.tokens, *example.choices))
                if not self._truncated[name, other] and all(len(part.ids) <= self.longest for part in tokens):
                    known[name] = examples
        return known

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

        Both mixtures share the rows that either has read and tokenised, so change no setting of one but `eval_limit`.
        """
        by_name = {task.name: task for task in self.tasks}
        found = copy.copy(self)
        found.tasks = [by_name[name] for name in names]
        found.__dict__.pop("contents", None)
        return found

    @property
    def counts(self) -> dict[str, int]:
        """How many rows of each held-in task one epoch takes."""
        sizes = {name: len(examples) for name, examples in self._split("train").items()}
        weights = {task.name: task.weight for task in self.tasks}
        return epoch_counts(sizes, self.mixing, weights, {task.name: task.cap for task in self.tasks})

    def reading_of(self, tasks: Iterable[str]) -> dict[str, Any]:
        """Return how rows of some tasks, or of all if it has none of these, become tokens: `max_length`, and a hash of
        the chat template, or None without.
        """
        read = self._read()
        mine = [read[task] for task in tasks if task in read] or list(read.values())
        chat = self.chat_template or any(row.messages for found in mine for row in found[:1])
        template = template_hash(self.row_tokenizer().tokenizer) if chat else None
        return {"max_length": self.max_length, "chat_template": template}

    @cached_property
    def contents(self) -> dict[str, dict[str, Any]]:
        """The rows of each held-in task by split, and the hash of their contents."""
        return {
            name: {"rows": dict(Counter(str(row.split) for row in found)), "hash": content_hash(found)}
            for name, found in self._read().items()
            if self.roles[name] == "held_in"
        }

    def sizes(self) -> list[SplitSize]:
        """Return the rows and tokens of each task and split that has rows; held-out tasks have only test rows."""
        found = []
        for name, role in self.roles.items():
            for split in SPLITS:
                if rows := self._split(split).get(name):
                    tokens = sum(len(row.tokens.ids) for row in rows)
                    found.append(
                        SplitSize(name, role, split, len(rows), tokens, self._truncated[name, self._key(split)])
                    )
        return found

    def rows(self, split: str) -> dict[str, list[Row]]:
        """Return the rows of one split by task: all training rows, or at most `eval_limit` others of a task."""
        found, read = {}, self._read()
        for task in self._with(split):
            mine = [row for row in read[task.name] if row.split == split]
            most = len(mine) if split == "train" else self.eval_limit or len(mine)
            found[task.name] = spread_evenly(mine, most)
        return found

    def setup(self, stage: str | None = None) -> None:
        """Read all rows, and tokenise those that the stage needs; raise if one is bad, or a task has none for it."""
        # Worker processes would gain nothing: the rows are in memory and tokenised.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        if self._predicts != (stage == "predict"):
            # Only prediction takes rows without targets.
            self._predicts, self._rows, self._examples = stage == "predict", {}, {}
        needed = {"fit": ["train"], "validate": ["validation"], None: list(SPLITS)}.get(stage, ["test"])
        for split in needed:
            examples = self._split(split)
            if not examples:
                raise ValueError(f"there are no {split} rows: all of {', '.join(self.roles)} are held out")
            for name, rows in examples.items():
                if not rows:
                    splits = Counter(row.split for row in self._read()[name])
                    has = ", ".join(f"{count} {known}" for known, count in splits.items())
                    raise ValueError(
                        f"task {name!r} has no {split} rows, only {has}; give some of its rows the split {split!r}"
                    )
        if "train" in needed:
            self._split("validation")
            total = sum(self.counts.values())
            for name, count in self.counts.items():
                share, passes = count / total, count / len(self._split("train")[name])
                more = f", {share:.1%} of all, each {passes:.2f} times" if len(self.counts) > 1 or passes != 1 else ""
                self._log(f"{name}: {count} rows in an epoch{more}")
            more = " (data.packing leaves it out)" if self.packing is False else ""
            self._log(f"padding is {self.padding():.1%} of the tokens of training batches{more}")

    def validation_examples(self, targets: bool = True) -> dict[str, list[Example]]:
        """Return the validation rows of each held-in task; without targets, as `input_examples` gives them."""
        if not targets:
            return self.input_examples(["validation"])
        self.setup("validate")
        return self._split("validation")

    def input_examples(self, splits: Sequence[str]) -> dict[str, list[Example]]:
        """Return rows of each held-in task as inputs without targets or choices; rows need no target.

        One with neither target nor split counts as a validation row. `eval_limit` holds where no training rows are
        asked for.
        """
        limit = None if "train" in splits else self.eval_limit
        which, asked, problems = " or ".join(splits), dict[str, list[Row]](), list[str]()
        kind = f"inputs of {which}"
        for task in (task for task in self.tasks if task.held_in):
            rows: list[Row] = []
            if task.name not in self._known(kind):
                rows, bad = task.read(targets=False)
                problems += bad
                rows = [row if row.target or row.split else replace(row, split="validation") for row in rows]
                rows = [row for row in self._divided(task, rows) if row.split in splits]
                if not (rows or bad):
                    raise ValueError(f"task {task.name!r} has no {which} rows; give some rows the split {splits[-1]!r}")
            asked[task.name] = [
                replace(row, target=None, choices=(), messages=row.messages[:-1] if row.target else row.messages)
                for row in spread_evenly(rows, limit or len(rows))
            ]
        raise_for_bad_rows(problems)
        return self._tokenised(kind, asked)

    def inputs(self, most: int) -> dict[str, list[Example]]:
        """Return at most `most` training examples of all tasks together, spread evenly over them."""
        chosen = spread_evenly(list(chain.from_iterable(self._split("train").values())), most)
        return {task: [one for one in chosen if one.task == task] for task in dict.fromkeys(one.task for one in chosen)}

    def train_dataloader(self) -> DataLoader:
        """Return the batches of the epoch of `loader.sampler.set_epoch`, in an order that only seeds change."""
        examples, counts = self._split("train"), self.counts
        sizes, position = {name: len(rows) for name, rows in examples.items()}, partial(next_batch, self.trainer)
        seed = seed_of_run(self.seed)
        order = partial(epoch_order, sizes, counts, seed)
        sampler = MixtureSampler(order, sum(counts.values()), self.batch_size, *self._place(), position)
        loader = ResumableLoader(
            dataset=ExampleSet(list(chain.from_iterable(examples.values()))),
            batch_size=max(1, self.batch_size // sampler.num_replicas),
            sampler=sampler,
            collate_fn=self._training_collator,
            generator=torch.Generator(),
        )
        loader.identity = {"rows": counts, "batch_size": self.batch_size, "seed": seed}
        loader.trainer = self.trainer
        return loader

    def choose_packing(self, keeps_rows_apart: Callable[[], bool]) -> None:
        """Pack training batches if `packing` is not given, much of them is padding, and the model keeps rows apart."""
        if self.packing is not None:
            return
        self.packed = False
        self.packed = self.padding() > LITTLE_PADDING and keeps_rows_apart()
        self._training_collator.pack_length = self.max_length if self.packed else None
        if self.packed:
            self._log(f"rows are packed, which leaves {self.padding():.1%} (data.packing false pads them)")

    @cached_property
    def _training_collator(self) -> Collator:
        return Collator(self.row_tokenizer().pad_id, False, self.max_length if self.packed else None)

    def learn_choices(self, learns: bool = True) -> None:
        if learns and not self._learns_choices:
            for name, rows in [*self.rows("train").items(), *self.rows("validation").items()]:
                if not all(row.choices for row in rows):
                    raise ValueError(
                        f"a loss of preferences compares answers, and rows of {name} have one each; give rows of "
                        "prompt, chosen and rejected, or of input, target and choices"
                    )
        self._learns_choices = learns

    def padding(self) -> float:
        """Return the share of padding among the tokens of the first thousand training batches of this process."""
        (rank, processes), examples = self._place(), self._split("train")
        sizes = {name: len(rows) for name, rows in examples.items()}
        order = epoch_order(sizes, self.counts, seed_of_run(self.seed), 0)
        known = [len(row.tokens.ids) for rows in examples.values() for row in rows]
        lengths = [known[row] for row in order.tolist()[rank::processes]]
        size, tokens, read = max(1, self.batch_size // processes), 0, 0
        for first in range(0, min(len(lengths), size * 1000), size):
            batch = lengths[first : first + size]
            divided = packs(batch, self.max_length) if self.packed else [[row] for row in range(len(batch))]
            tokens += sum(batch)
            read += len(divided) * max(sum(batch[row] for row in pack) for pack in divided)
        return 1 - tokens / read

    def val_dataloader(self) -> DataLoader | list[Any]:
        """Return the validation rows of the held-in tasks, ordered as in the test; an empty list without rows."""
        examples = _taking_turns(list(self._split("validation").values()))
        return self._evaluation_loader(examples, self._unlimited("limit_val_batches")) if examples else []

    def test_dataloader(self) -> DataLoader:
        """Return the test rows of all tasks, the longest first, or in turns where the trainer limits the batches."""
        examples = _taking_turns(list(self._split("test").values()))
        return self._evaluation_loader(examples, self._unlimited("limit_test_batches"))

    def predict_dataloader(self) -> DataLoader:
        """Return the test rows of all tasks, task after task, in the order of their files."""
        return self._evaluation_loader(list(chain.from_iterable(self._split("test").values())), by_length=False)

    def _evaluation_loader(self, examples: Sequence[Example], by_length: bool) -> DataLoader:
        order = sorted(range(len(examples)), key=lambda row: -len(examples[row].tokens.ids)) if by_length else None
        return DataLoader(
            dataset=ExampleSet(examples),
            batch_size=self.eval_batch_size,
            sampler=EvaluationSampler(len(examples), *self._place(), order),
            collate_fn=Collator(self.row_tokenizer().pad_id),
            # Without a generator of its own, a loader takes numbers from the global one.
            generator=torch.Generator(),
        )

    def _unlimited(self, limit: str) -> bool:
        """Return whether the trainer reads all batches of an evaluation; an int limits it, 1 as well."""
        found = None if self.trainer is None else getattr(self.trainer, limit)
        return found is None or (isinstance(found, float) and found == 1)

    def _place(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _read(self) -> dict[str, list[Row]]:
        problems = []
        for task in (task for task in self.tasks if task.name not in self._rows):
            found, bad = task.read(not self._predicts, self._log)
            problems += bad
            if not bad:
                self._rows[task.name] = self._divided(task, found)
                if self.trainer is None or self.trainer.is_global_zero:
                    warn_of_repeats(task.name, self._rows[task.name])
        raise_for_bad_rows(problems)
        return {task.name: self._rows[task.name] for task in self.tasks}

    def _divided(self, task: Task, rows: Sequence[Row]) -> list[Row]:
        return fill_splits(rows, self.validation_ratio, self.test_ratio, self.split_seed, task.held_in)

    def _split(self, split: str) -> dict[str, list[Example]]:
        known, tasks = self._known(split), self._with(split)
        if all(task.name in known for task in tasks):
            return {task.name: known[task.name] for task in tasks}
        return self._tokenised(split, self.rows(split))

    def _tokenised(self, kind: str, rows: Mapping[str, Sequence[Row]]) -> dict[str, list[Example]]:
        known, tokenize, problems = self._known(kind), self.row_tokenizer(), list[str]()
        for name, found in rows.items():
            if name in known:
                continue
            examples, cut, bad = tokenize(name, found, learn=kind == "train")
            problems += bad
            self._truncated[name, self._key(kind)] = cut
            if cut:
                which = f"{cut} of {len(found)} {kind} rows are longer than {tokenize.limit}"
                self._log(f"{name}: {which} and lost their start", logging.WARNING)
            if not bad:
                known[name] = examples
        raise_for_bad_rows(problems)
        return {name: known[name] for name in rows}

    def _with(self, split: str) -> list[Task]:
        """Return the tasks that have rows of a split: held-out ones have only test rows."""
        return [task for task in self.tasks if split == "test" or task.held_in]

    def row_tokenizer(self) -> RowTokenizer:
        """Return what makes tokens of rows by these settings."""
        if self.tokenizer is None:
            raise ValueError("the task mixture has no tokenizer; set data.tokenizer to the model's directory or hub id")
        if isinstance(self.tokenizer, str):
            self.tokenizer = Base.open(self.tokenizer).tokenizer()
        return RowTokenizer(self.tokenizer, self.max_length, self.chat_template, self.context, self._learns_choices)

    def _log(self, sentence: str, level: int = logging.INFO) -> None:
        if self.trainer is None or self.trainer.is_global_zero:
            self.said.append(sentence)
            log.log(level, sentence)


def _taking_turns(tasks: Sequence[Sequence[Any]]) -> list[Any]:
    return [row for turn in zip_longest(*tasks) for row in turn if row is not None]
