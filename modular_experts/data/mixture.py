"""Turn tasks into batches, as a LightningDataModule; a loader only pads or packs rows that are tokenised already.

`tokenised.py` reads and tokenises the rows, and tells when. `setup` checks that a stage has the rows that it needs, a
fit chooses whether to pack (`choose_packing`), and `epoch.py` draws the order of an epoch.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain, zip_longest

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from modular_experts.data.batch import LITTLE_PADDING, Batch, Collator, Example, ExampleSet, packs
from modular_experts.data.epoch import (
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
from modular_experts.data.rows import SPLITS
from modular_experts.data.tasks import Tasks
from modular_experts.data.tokenised import TokenisedTasks

INSPECTED = 1000
"""How many training batches `padding` looks at."""


class TaskMixture(TokenisedTasks, LightningDataModule):
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
        shots: Demonstrations before each row: other training rows of its task with their targets, the same for every
            model. They take the place that the row leaves in `max_length`, so that a long row has fewer.
        shots_seed: Seed of the draw of demonstrations, apart from `seed`.
        label_choices: Compare the likelihoods of the labels of the task's training rows in the test of rows that have
            no `choices`. Targets are labels if there are at most 100, each of three training rows on average.
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
        shots: int = 0,
        shots_seed: int = 0,
        label_choices: bool = False,
    ) -> None:
        for name, value in (
            ("batch_size", batch_size),
            ("eval_batch_size", eval_batch_size),
            ("eval_limit", eval_limit),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        LightningDataModule.__init__(self)
        TokenisedTasks.__init__(
            self,
            tasks,
            tokenizer,
            max_length,
            chat_template,
            eval_limit,
            validation_ratio,
            test_ratio,
            split_seed,
            shots,
            shots_seed,
            label_choices,
        )
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.mixing = Proportional() if mixing is None else mixing
        self.seed = seed
        self.packing = packing
        self.packed = bool(packing)
        """Whether training batches are packed: `packing`, or what `choose_packing` chose."""

    def setup(self, stage: str | None = None) -> None:
        """Read all rows, and tokenise those that the stage needs; raise if one is bad, or a task has none for it."""
        # Worker processes would gain nothing: the rows are in memory and tokenised.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        self.read_targets(stage != "predict")
        needed = {"fit": ["train"], "validate": ["validation"], None: SPLITS}.get(stage, ["test"])
        for split in needed:
            self.need_rows(split)
        if "train" in needed:
            self.examples("validation")
            self._log_epoch()

    def _log_epoch(self) -> None:
        """Log what an epoch reads of each task, and how much of its batches is padding."""
        counts = self.counts
        total = sum(counts.values())
        for name, count in counts.items():
            passes = count / len(self.examples("train")[name])
            share = ""
            if len(counts) > 1 or passes != 1:
                share = f", {count / total:.1%} of all, each {passes:.2f} times"
            self._log(f"{name}: {count} rows in an epoch{share}")
        left_out = " (data.packing leaves it out)" if self.packing is False else ""
        self._log(f"padding is {self.padding():.1%} of the tokens of training batches{left_out}")

    @property
    def counts(self) -> dict[str, int]:
        """How many rows of each held-in task one epoch takes."""
        weights = {task.name: task.weight for task in self.tasks}
        caps = {task.name: task.cap for task in self.tasks}
        return epoch_counts(self._training_sizes, self.mixing, weights, caps)

    @property
    def _training_sizes(self) -> dict[str, int]:
        return {name: len(rows) for name, rows in self.examples("train").items()}

    def train_dataloader(self) -> DataLoader:
        """Return the batches of the epoch of `loader.sampler.set_epoch`, in an order that only seeds change."""
        counts = self.counts
        seed = seed_of_run(self.seed)
        rank, processes = self._rank_and_processes()
        sampler = MixtureSampler(
            partial(epoch_order, self._training_sizes, counts, seed),
            sum(counts.values()),
            self.batch_size,
            rank,
            processes,
            partial(next_batch, self.trainer),
        )
        loader = ResumableLoader(
            dataset=ExampleSet(list(chain.from_iterable(self.examples("train").values()))),
            batch_size=max(1, self.batch_size // processes),
            sampler=sampler,
            collate_fn=self._training_batch,
            generator=torch.Generator(),
        )
        loader.identity = {"rows": counts, "batch_size": self.batch_size, "seed": seed}
        loader.trainer = self.trainer
        return loader

    def _training_batch(self, examples: Sequence[Example]) -> Batch:
        # A loader may be older than the choice of packing, so each batch asks for it.
        pack_length = self.max_length if self.packed else None
        return Collator(self.row_tokenizer().pad_id, texts=False, pack_length=pack_length)(examples)

    def choose_packing(self, keeps_rows_apart: Callable[[], bool]) -> None:
        """Pack training batches if `packing` is not given, much of them is padding, and the model keeps rows apart."""
        if self.packing is not None:
            return
        self.packed = False
        self.packed = self.padding() > LITTLE_PADDING and keeps_rows_apart()
        if self.packed:
            self._log(f"rows are packed, which leaves {self.padding():.1%} (data.packing false pads them)")

    def padding(self) -> float:
        """Return the share of padding among the tokens of the first thousand training batches of this process."""
        rank, processes = self._rank_and_processes()
        order = epoch_order(self._training_sizes, self.counts, seed_of_run(self.seed), 0)
        row_lengths = [len(row.tokens.ids) for rows in self.examples("train").values() for row in rows]
        lengths = [row_lengths[row] for row in order.tolist()[rank::processes]]
        size = max(1, self.batch_size // processes)
        tokens = 0
        places = 0
        for first in range(0, min(len(lengths), size * INSPECTED), size):
            batch = lengths[first : first + size]
            divided = packs(batch, self.max_length) if self.packed else [[row] for row in range(len(batch))]
            tokens += sum(batch)
            places += len(divided) * max(sum(batch[row] for row in pack) for pack in divided)
        return 1 - tokens / places

    def val_dataloader(self) -> DataLoader | list[Batch]:
        """Return the validation rows of the held-in tasks, ordered as in the test; an empty list without rows."""
        examples = _taking_turns(self.examples("validation"))
        return self._evaluation_loader(examples, self._is_unlimited("limit_val_batches")) if examples else []

    def test_dataloader(self) -> DataLoader:
        """Return the test rows of all tasks, the longest first, or in turns where the trainer limits the batches."""
        return self._evaluation_loader(_taking_turns(self.examples("test")), self._is_unlimited("limit_test_batches"))

    def predict_dataloader(self) -> DataLoader:
        """Return the test rows of all tasks, task after task, in the order of their files."""
        return self._evaluation_loader(list(chain.from_iterable(self.examples("test").values())), by_length=False)

    def _evaluation_loader(self, examples: Sequence[Example], by_length: bool) -> DataLoader:
        order = sorted(range(len(examples)), key=lambda row: -len(examples[row].tokens.ids)) if by_length else None
        return DataLoader(
            dataset=ExampleSet(examples),
            batch_size=self.eval_batch_size,
            sampler=EvaluationSampler(len(examples), *self._rank_and_processes(), order),
            collate_fn=Collator(self.row_tokenizer().pad_id),
            # Without a generator of its own, a loader takes numbers from the global one.
            generator=torch.Generator(),
        )

    def _is_unlimited(self, name: str) -> bool:
        """Return whether the trainer reads all batches of an evaluation; an int limits it, 1 as well."""
        limit = None if self.trainer is None else getattr(self.trainer, name)
        return limit is None or (isinstance(limit, float) and limit == 1)

    def _rank_and_processes(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)


def _taking_turns(examples: Mapping[str, Sequence[Example]]) -> list[Example]:
    """Return the first row of each task, then the second of each, and so on."""
    return [row for turn in zip_longest(*examples.values()) for row in turn if row is not None]
