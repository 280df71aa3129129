"""Define the batch, the one thing that data and training both know.

A batch is a dict, for `n` rows padded on the right to the longest, `length`:

    input_ids       (n, length) int64; the prompt, the target, end-of-sequence, padding
    attention_mask  (n, length) int64; 1 on tokens and 0 on padding, by its place and never by a token's id
    labels          (n, length) int64; the id at the places of the target and its end-of-sequence, IGNORED elsewhere; a
                    conversation that is trained on has such places in each of the assistant's turns
    task            list of n names; "" marks a filler row, which no score counts (see `is_filler`)

The prompt of a row is its tokens before the first labelled one; the target of a conversation that is validated or
tested is the assistant's last turn, and its prompt is all before. Batches of validation, test and prediction also carry

    input, target   lists of n texts as in the data, after the task's template
    choices         only if a row has choices: a dict of input_ids, attention_mask and labels for all m choices of all
                    rows, row (m,) int64, the row that a choice belongs to, and correct (m,) bool
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

IGNORED = -100
FILLER = -1

Batch = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Tokens:
    """A prompt and what follows it: `ids` `(length,)`, of which the first `prompt` are the prompt.

    `answers` `(length,)` is true on the places to learn, if they are others than all that follow the prompt.
    """

    ids: Tensor
    prompt: int
    answers: Tensor | None = None

    @property
    def labels(self) -> Tensor:
        """The ids to learn at their places, and `IGNORED` elsewhere, `(length,)` int64."""
        learned = torch.arange(len(self.ids)) >= self.prompt if self.answers is None else self.answers
        return self.ids.to(torch.int64).masked_fill(~learned, IGNORED)


@dataclass(frozen=True, eq=False)
class Example:
    """A tokenised row; `choices` are the row's prompt with each choice in the target's place."""

    task: str
    input: str
    target: str
    tokens: Tokens
    choices: tuple[Tokens, ...] = ()
    correct: int = 0


class ExampleSet(Dataset):
    """Examples by number. `FILLER` gives a copy of the first one with no task and no labels."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        if index != FILLER:
            return self.examples[index]
        first = self.examples[0]
        return replace(first, task="", tokens=Tokens(first.tokens.ids, len(first.tokens.ids)), choices=())


@dataclass(frozen=True)
class Collator:
    """Makes a batch of examples, padded with `pad_id`; without `texts`, as in training, also without choices."""

    pad_id: int
    texts: bool = True

    def __call__(self, examples: Sequence[Example]) -> Batch:
        batch: Batch = _padded([example.tokens for example in examples], self.pad_id)
        batch["task"] = [example.task for example in examples]
        if self.texts:
            batch["input"] = [example.input for example in examples]
            batch["target"] = [example.target for example in examples]
            choices = [choice for example in examples for choice in example.choices]
            if choices:
                counts = torch.tensor([len(example.choices) for example in examples])
                correct = [number == example.correct for example in examples for number in range(len(example.choices))]
                batch["choices"] = _padded(choices, self.pad_id) | {
                    "row": torch.arange(len(examples)).repeat_interleave(counts),
                    "correct": torch.tensor(correct),
                }
        return batch


def is_filler(batch: Batch) -> list[bool]:
    """Return of each row whether it is a filler, which keeps processes in step and counts in no score or file."""
    return [task == "" for task in batch["task"]]


def prompts(batch: Batch) -> list[Tensor]:
    """Return the prompt of each row, unpadded; a row without labels is all prompt."""
    labelled = batch["labels"] != IGNORED
    lengths = batch["attention_mask"].sum(1)
    starts = torch.where(labelled.any(1), labelled.int().argmax(1), lengths)
    return [ids[:start] for ids, start in zip(batch["input_ids"], starts.tolist(), strict=True)]


def _padded(rows: Sequence[Tokens], pad_id: int) -> Batch:
    shape = len(rows), max(len(row.ids) for row in rows)
    ids = torch.full(shape, pad_id, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row.ids)] = row.ids
        mask[number, : len(row.ids)] = 1
        labels[number, : len(row.ids)] = row.labels
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
