"""Take statistics of experts on rows of the tasks they were trained on, and store them beside the experts."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from modular_experts.base import Base
from modular_experts.base.apply import applied
from modular_experts.base.device import device
from modular_experts.base.sentence_encoder import SentenceEncoder
from modular_experts.data import Batch, Inputs, TaskMixture
from modular_experts.data.batch import IGNORED, Collator, Example, ExampleSet
from modular_experts.data.rows import spread_evenly
from modular_experts.evaluation.gram import gram, merged_grams
from modular_experts.injection import context_length
from modular_experts.injection.task_heads import put_task_heads
from modular_experts.library import StoredExpert, open_experts, union_of_weights, write_statistics
from modular_experts.library.record import Record
from modular_experts.library.statistics import OF_INPUTS, StoredStatistics, check_statistics_targets
from modular_experts.merging.fisher_information import fisher
from modular_experts.merging.gate_statistics import train_gates
from modular_experts.merging.objective import ValidationRows, answers_of
from modular_experts.methods.method import DataStatistic
from modular_experts.progress import Counted, Progress
from modular_experts.routing.prompts import prompt_grams, prompt_tokens, prompt_vectors
from modular_experts.routing.router import Encode

log = logging.getLogger(__name__)

KINDS = ("fisher", "gates", "gram", "merged_gram", "prompt_parts", "prompts")
ROWS = 256
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where prompts are read for routers, after these shares of the transformer blocks."""
ENCODER_NAME = "encoder"
GRAMS_NAME = "n-grams"
SHARED = 0.9
"""A token counts as one of the instruction if at least this share of an expert's prompts hold it."""
MOST_CUT = 0.75
"""A part without its front lacks at most this share of the prompt."""

Statistics = Mapping[str, DataStatistic | None]
"""The statistics of one expert by name: of a weight, or of a depth where prompts are read."""


class _ReadPrompts(NamedTuple):
    """A batch of prompts: token ids, attention mask, and which places belong to the prompts, `(rows, length)`."""

    ids: Tensor
    mask: Tensor
    prompt: Tensor


def prompt_statistics(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    parts: bool = False,
    depths: Sequence[float] = DEPTHS,
    encode: Encode | None = None,
) -> dict[str, DataStatistic]:
    """Return the vectors of all prompts, `(rows, size)`, for each depth, under `depth 0.25` and so on, and `n-grams`.

    With `encode` the vectors of their texts are there, too, under `encoder`.

    With `parts`, a part of each prompt follows it, `(2 rows, size)`. The parts of the first, third, ... prompt lack the
    instruction: they are the longest stretch of tokens between the first places of the tokens that nearly all prompts
    hold (`SHARED`). The other parts lack a share of the tokens at the front, between 0 and `MOST_CUT`. An encoder reads
    a text for its meaning, so it gets all parts without the instruction.
    """
    read: list[_ReadPrompts] = []
    vectors: list[list[Tensor]] = []

    def vectors_of(ids: Tensor, mask: Tensor, of_text: Tensor, prompt: Tensor) -> list[Tensor]:
        of_depths = prompt_vectors(model, ids, mask, depths, prompt)
        of_texts = [] if encode is None else [encode(model, prompt_tokens(ids, of_text, prompt))]
        return [*of_depths, *of_texts, prompt_grams(ids, mask, prompt)]

    for batch in batches:
        ids = batch["input_ids"].to(model.device)
        mask = batch["attention_mask"].to(model.device)
        # The places before the first target.
        prompt = (batch["labels"].to(model.device) != IGNORED).cumsum(1) == 0
        read.append(_ReadPrompts(ids, mask, prompt))
        vectors.append(vectors_of(ids, mask, mask, prompt))
    if not read:
        raise ValueError("prompts need at least one row, and there was none")
    # From batches with all depths to depths with all rows.
    columns = [torch.cat(column) for column in zip(*vectors, strict=True)]
    if parts:
        masks = zip(read, _parts(read), _parts(read, fronts=False), strict=True)
        cut = [vectors_of(own.ids, part, of_text, own.prompt) for own, part, of_text in masks]
        columns_of_parts = [torch.cat(column) for column in zip(*cut, strict=True)]
        pairs = zip(columns, columns_of_parts, strict=True)
        columns = [torch.stack(pair, 1).flatten(0, 1) for pair in pairs]
    names = [*map(name_of, depths), *([] if encode is None else [ENCODER_NAME]), GRAMS_NAME]
    return {name: DataStatistic(column) for name, column in zip(names, columns, strict=True)}


def _parts(batches: Sequence[_ReadPrompts], fronts: bool = True) -> Iterator[Tensor]:
    """Yield for each batch the attention mask of a part of each prompt; every second one lacks its front if `fronts`.

    The others lack the instruction.
    """
    inside = [batch.prompt & batch.mask.bool() for batch in batches]
    rows: list[list[int]] = []
    for batch, places in zip(batches, inside, strict=True):
        rows += [ids[own].tolist() for ids, own in zip(batch.ids, places, strict=True)]
    holders = Counter(token for row in rows for token in set(row))
    shared = {token for token, prompts in holders.items() if prompts >= SHARED * len(rows)}
    number = 0
    for places in inside:
        mask = torch.zeros_like(places, dtype=torch.int64)
        for line, own in zip(mask, places, strict=True):
            line[own.nonzero()[:, 0][part_of(rows[number], number if fronts else 0, shared)]] = 1
            number += 1
        yield mask


def part_of(tokens: Sequence[int], number: int, shared: Set[int]) -> slice:
    """Return which tokens of the prompt of a `number` are its part; `shared` holds the tokens of the instruction.

    The longest stretch between shared tokens is the last of equally long ones, or the last token where there is none.
    """
    if number % 2:
        # Multiples of the golden ratio, without their whole parts, are spread evenly whatever the number of rows.
        share = (number + 1) * 0.6180339887498949 % 1
        return slice(min(int(MOST_CUT * share * len(tokens)), max(len(tokens) - 1, 0)), None)
    first = {token: place for place, token in reversed(list(enumerate(tokens))) if token in shared}
    edges = [-1, *sorted(first.values()), len(tokens)]
    length, start = max((end - start - 1, start + 1) for start, end in pairwise(edges))
    return slice(start, start + length) if length else slice(-1, None)


def name_of(depth: float) -> str:
    """Return the name under which the vectors of a depth are stored."""
    return f"depth {depth:g}"


def take_statistics(
    experts: Sequence[str | Path | StoredExpert],
    kind: str,
    data: ValidationRows | TaskMixture,
    overwrite: bool = False,
    progress: Progress = iter,
    steps: int | None = None,
    depths: Sequence[float] = DEPTHS,
    encoder: str | None = None,
) -> list[StoredStatistics]:
    """Measure experts that are to be merged, each at every weight that any of them moves, and store the statistics.

    Args:
        experts: Directories of the experts, or opened experts.
        kind: `fisher`, `gram`, or `merged_gram`, which holds only for the merge of exactly these experts; or
            `prompts`, `prompt_parts` and `gates`, from which routers learn.
        data: The validation rows of their tasks, for prompts also the training rows; each expert is measured on the
            tasks that its record names, and with `labels="experts"` answers them itself. A `TaskMixture` alone stands
            for at most 256 labelled rows of each task, `ValidationRows()` for the inputs that the experts keep.
        overwrite: Replace statistics of this kind that are there.
        steps: For `gates`, how many steps they are trained for; 100 if not given.
        depths: For prompts, after which shares of the transformer blocks they are read, rising; a router reads some.
        encoder: For prompts, an encoder of sentences that reads their texts, too, for a router that has it.

    Raises:
        FileExistsError: An expert has statistics of this kind; nothing has been read yet.
        ValueError: Bases differ, or an expert has no validation rows; nothing has been measured yet.
    """
    asked = ValidationRows(data, ROWS) if isinstance(data, TaskMixture) else data
    _check(kind, asked, steps, encoder)
    # What only reads the base is the same for experts that act on answers alone.
    opened = open_experts(experts, base=asked.base, on_answers=kind in OF_INPUTS)
    check_statistics_targets(opened, kind, overwrite)
    mixture, labels = asked.of_experts(opened)
    base = Base.open(asked.base, opened)
    encode = SentenceEncoder(encoder) if encoder else None
    mixture.take_tokenizer(base)
    if kind in OF_INPUTS:
        labels = "rows"
        # No input of a test row is an input of a training row, so these may be read, too.
        reading = _Reading(mixture, ["train", "validation"], False, asked.rows)
    else:
        reading = _Reading(mixture, ["validation"], labels == "rows", asked.rows)
    readings = [reading.as_trained(expert) for expert in opened]
    # What is refused is refused before the base is loaded.
    for expert, own in zip(opened, readings, strict=True):
        own.examples_of(expert)
    model: Any = base.load(asked.dtype or "float32")
    if kind not in OF_INPUTS:
        put_task_heads(model, opened)
    examples = []
    for expert, own in zip(opened, readings, strict=True):
        own.data.fit_context(context_length(model))
        examples.append(own.examples_of(expert))
    model.to(device())
    facts: Record = {"split": "kept inputs" if asked.data is None else " and ".join(reading.splits)}
    facts["max_length"] = mixture.max_length
    if encode is not None:
        facts[ENCODER_NAME] = encode.fingerprint
    if labels == "experts":
        facts["labels"] = labels
        size = mixture.eval_batch_size
        pairs = zip(opened, examples, strict=True)
        examples = [answers_of(*pair, model, mixture, size, asked.max_new_tokens) for pair in pairs]
    batches = [batches_by_length(rows, mixture) for rows in examples]
    stored = []
    measured = _measured(kind, model, opened, batches, steps, depths, progress, encode)
    for expert, rows, statistics in zip(opened, examples, measured, strict=True):
        tasks = Counter(row.task for row in rows)
        tokens = sum(len(row.tokens.ids) for row in rows)
        among = opened if kind == "merged_gram" else ()
        written = {**facts, "tokens": tokens}
        stored.append(write_statistics(expert, kind, statistics.items(), tasks, written, among, overwrite))
    return stored


def _check(kind: str, asked: ValidationRows, steps: int | None, encoder: str | None) -> None:
    """Refuse settings that a kind of statistics does not have."""
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not a kind of statistics; the kinds are {', '.join(KINDS)}")
    if kind in OF_INPUTS and asked.labels == "experts":
        raise ValueError(f"{kind} are read without answers; leave labels out")
    if encoder and kind not in OF_INPUTS:
        raise ValueError(f"encoder={encoder!r} reads prompts, and {kind} are of something else; leave encoder out")
    if asked.expert_of:
        raise ValueError("each expert answers the rows of its own tasks; leave expert_of out")
    if steps is not None and (kind != "gates" or steps < 1):
        raise ValueError(f"steps={steps} must be at least 1, and is for gates alone, which are trained")


def _measured(
    kind: str,
    model: PreTrainedModel,
    experts: Sequence[StoredExpert],
    batches: Sequence[list[Batch]],
    steps: int | None,
    depths: Sequence[float],
    progress: Progress,
    encode: Encode | None,
) -> Iterator[Statistics]:
    """Yield the statistics of each expert."""
    names = list(union_of_weights(experts))
    if kind == "merged_gram":
        yield from merged_grams(model, experts, batches, names, progress)
        return
    for expert, own in zip(experts, batches, strict=True):
        if kind == "gates":
            yield train_gates(model, expert, own, steps, progress=progress)[0]
            continue
        shown = progress(Counted(own, "batches"))
        if kind in OF_INPUTS:
            # A router reads the states of the base alone.
            yield prompt_statistics(model, shown, kind == "prompt_parts", depths, encode)
            continue
        with applied(model, expert, check=False):
            yield fisher(model, shown, names) if kind == "fisher" else gram(model, shown, names)


def batches_by_length(examples: Sequence[Example], data: TaskMixture) -> list[Batch]:
    """Return padded batches of some rows of a mixture, the shortest first, so that they need little padding."""
    collate = Collator(data.row_tokenizer().pad_id)
    ordered = ExampleSet(sorted(examples, key=lambda example: len(example.tokens.ids)))
    # Without a generator of its own, a loader would draw from the global one.
    return list(DataLoader(ordered, data.eval_batch_size, collate_fn=collate, generator=torch.Generator()))


class _Reading(NamedTuple):
    """Which rows of a mixture an expert is measured on: at most `rows` of each of its tasks.

    Rows with `targets` are validation rows; without them, rows of the `splits`.
    """

    data: TaskMixture
    splits: list[str]
    targets: bool
    rows: int

    def as_trained(self, expert: StoredExpert) -> Self:
        """Return the reading with or without the chat template, as in the expert's training by its record.

        A router compares a prompt with an expert's prompts in that expert's own form.
        """
        training = expert.record.get("training") or {}
        if isinstance(self.data, Inputs) or "chat_template" not in training:
            return self
        is_chat = training["chat_template"] is not None
        if is_chat == self.data.chat_template:
            return self
        own = [task for task in self.data.tasks if task.name in expert.record["tasks"]]
        # Conversations go through the template whatever the setting, and a tokenizer may have none.
        if any(row.messages for task in own for row in task.read(targets=False)[0][:1]):
            return self
        if self.data.row_tokenizer().tokenizer.chat_template is None:
            return self
        how = "through the chat template" if is_chat else "without the chat template"
        log.warning("%s is measured on rows that are read %s, as in its training", expert.name, how)
        data = self.data.only(list(self.data.roles))
        data.chat_template = is_chat
        return self._replace(data=data)

    def examples_of(self, expert: StoredExpert) -> list[Example]:
        """Return rows of the tasks that an expert was trained on, task after task."""
        trained_on = list(map(str, expert.record["tasks"]))
        read = self.data.validation_examples() if self.targets else self.data.input_examples(self.splits)
        by_task = {task: examples for task, examples in read.items() if task in trained_on}
        if not by_task:
            raise ValueError(self._without_rows(expert, ", ".join(trained_on) or "no task that its record names"))
        return [row for task in by_task.values() for row in spread_evenly(task, self.rows)]

    def _without_rows(self, expert: StoredExpert, trained_on: str) -> str:
        """Return a sentence on an expert none of whose tasks has rows here, and how to help."""
        there = f"the task files have {' or '.join(self.splits)} rows of {', '.join(self.data.roles)} only"
        adapter = expert.record.get("source")
        if not adapter:
            advice = "give its tasks the names that they had in training"
            return f"{expert.path} was trained on {trained_on}, and {there}; {advice}"
        # No adapter records its tasks, so its name counts as one.
        first = next(iter(self.data.roles))
        return (
            f"{adapter['id']} counts as trained on {trained_on}, and {there}; give its task's file, too; if it was "
            f"trained on {first}, say so, and name DIR in its place: import {adapter['id']} with `tasks={first!r}` "
            "and `out='DIR'`"
        )
