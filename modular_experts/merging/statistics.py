"""Take statistics of experts on rows of the tasks they were trained on, and store them beside the experts."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from functools import partial
from itertools import chain, count, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from modular_experts.base import Base
from modular_experts.base.apply import applied
from modular_experts.base.device import device
from modular_experts.data import Batch, TaskMixture
from modular_experts.data.batch import IGNORED, Collator, Example, ExampleSet
from modular_experts.data.rows import spread_evenly
from modular_experts.data.tokenize import RowTokenizer
from modular_experts.evaluation import answered
from modular_experts.evaluation.gram import gram, merged_grams
from modular_experts.injection import context_length
from modular_experts.library import StoredExpert, open_experts, union_of_weights, write_statistics
from modular_experts.library.statistics import StoredStatistics, check_statistics_targets
from modular_experts.merging.fisher_information import fisher
from modular_experts.merging.gate_statistics import train_gates
from modular_experts.merging.objective import ValidationRows
from modular_experts.methods.method import DataStatistic
from modular_experts.progress import Counted, Progress
from modular_experts.routing.prompts import prompt_grams, prompt_vectors

StatisticKind = Literal["fisher", "gates", "gram", "merged_gram", "prompt_parts", "prompts"]
ROWS = 256
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where prompts are read for routers, after these shares of the transformer blocks."""
GRAMS_NAME = "n-grams"
SHARED = 0.9
"""A token counts as one of the instruction if at least this share of an expert's prompts hold it."""
MOST_CUT = 0.75
"""A part without its front lacks at most this share of the prompt."""


class TakingStatistics(NamedTuple):
    """How statistics of a kind are taken.

    Attributes:
        measure: Gets the model, the experts, the batches of each, the weights' names, `steps` and `progress`; yields
            the statistics of each expert.
        of_inputs: Whether it reads inputs alone. It then takes training rows too: no test input is a training input.
        together: Whether the statistics hold only for a merge of exactly these experts.
    """

    measure: Callable[..., Iterable[Mapping[str, Any]]]
    of_inputs: bool = False
    together: bool = False


def _each(measure: Callable[..., Mapping[str, Any]], of_inputs: bool = False) -> TakingStatistics:
    """Return a way to measure each expert by itself, on the base; a router reads the base's own states."""

    def each(model: Any, experts: Any, batches: Any, names: Any, steps: int | None, progress: Progress) -> Any:
        for expert, part in zip(experts, batches, strict=True):
            with applied(model, [] if of_inputs else expert, check=False):
                yield measure(model, progress(Counted(part, "batches")), names)

    return TakingStatistics(each, of_inputs)


def _gates(model: Any, experts: Any, batches: Any, names: Any, steps: int | None, progress: Progress) -> Any:
    for expert, part in zip(experts, batches, strict=True):
        yield train_gates(model, expert, part, steps, progress=progress)[0]


def prompts(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    names: Sequence[str],
    parts: bool = False,
    depths: Sequence[float] = DEPTHS,
) -> dict[str, DataStatistic]:
    """Return the vectors of all prompts, `(rows, size)`, for each depth, under `depth 0.25` and so on, and `n-grams`.

    With `parts`, a part of each prompt follows it, `(2 rows, size)`. The parts of the first, third, ... prompt lack the
    instruction: they are the longest stretch of tokens between the first places of the tokens that nearly all prompts
    hold (`SHARED`). The other parts lack a share of the tokens at the front, between 0 and `MOST_CUT`. The `names` of
    the experts' weights do not matter here.
    """
    found: list[list[Tensor]] = []
    kept = []

    def read(ids: Tensor, mask: Tensor, prompt: Tensor) -> list[Tensor]:
        return [*prompt_vectors(model, ids, mask, depths, prompt), prompt_grams(ids, mask, prompt)]

    for batch in batches:
        ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
        prompt = (batch["labels"].to(model.device) != IGNORED).cumsum(1) == 0
        found.append(read(ids, mask, prompt))
        kept.append((ids, mask, prompt))
    if not found:
        raise ValueError("prompts need at least one row, and there was none")
    whole = [torch.cat(vectors) for vectors in zip(*found, strict=True)]
    if parts:
        cut = [read(ids, part, prompt) for (ids, _, prompt), part in zip(kept, _parts(kept), strict=True)]
        pairs = zip(whole, map(torch.cat, zip(*cut, strict=True)), strict=True)
        whole = [torch.stack(pair, 1).flatten(0, 1) for pair in pairs]
    columns = zip([*map(name_of, depths), GRAMS_NAME], whole, strict=True)
    return {name: DataStatistic(vectors) for name, vectors in columns}


def _parts(batches: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Iterator[Tensor]:
    """Yield attention masks of a part of each prompt, for batches of token ids, attention masks and prompts."""
    read = [prompt & mask.bool() for _, mask, prompt in batches]
    ids = [line for batch, *_ in batches for line in batch]
    rows = [line[own].tolist() for line, own in zip(ids, chain.from_iterable(read), strict=True)]
    holds = Counter(token for row in rows for token in set(row))
    shared = {token for token, prompts in holds.items() if prompts >= SHARED * len(rows)}
    numbers = count()
    for owns in read:
        part = torch.zeros_like(owns, dtype=torch.int64)
        for line, own in zip(part, owns, strict=True):
            number = next(numbers)
            line[own.nonzero()[:, 0][part_of(rows[number], number, shared)]] = 1
        yield part


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


KINDS: dict[str, TakingStatistics] = {
    "fisher": _each(fisher),
    "gates": TakingStatistics(_gates),
    "gram": _each(gram),
    "merged_gram": TakingStatistics(
        lambda model, experts, batches, names, steps, progress: merged_grams(model, experts, batches, names, progress),
        together=True,
    ),
    "prompt_parts": _each(partial(prompts, parts=True), of_inputs=True),
    "prompts": _each(prompts, of_inputs=True),
}


def take_statistics(
    experts: Sequence[str | Path | StoredExpert],
    kind: StatisticKind,
    data: ValidationRows | TaskMixture,
    overwrite: bool = False,
    progress: Progress = iter,
    steps: int | None = None,
    depths: Sequence[float] = DEPTHS,
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

    Raises:
        FileExistsError: An expert has statistics of this kind; nothing has been read yet.
        ValueError: Bases differ, or an expert has no validation rows; nothing has been measured yet.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not a kind of statistics; the kinds are {', '.join(KINDS)}")
    way, given = KINDS[kind], ValidationRows(data, ROWS) if isinstance(data, TaskMixture) else data
    if way.of_inputs:
        way = _each(partial(prompts, parts=kind == "prompt_parts", depths=depths), of_inputs=True)
    if way.of_inputs and given.labels == "experts":
        raise ValueError(f"{kind} are read without answers; leave labels out")
    if given.expert_of:
        raise ValueError("each expert answers the rows of its own tasks; leave expert_of out")
    if steps is not None and (kind != "gates" or steps < 1):
        raise ValueError(f"steps={steps} must be at least 1, and is for gates alone, which are trained")
    opened = open_experts(experts, base=given.base)
    check_statistics_targets(opened, kind, overwrite)
    rows, (data, labels) = given.rows, given.found_for(opened)
    labels = "rows" if way.of_inputs else labels
    opened_base = Base.open(given.base, opened)
    data.take_tokenizer(opened_base)
    splits, targets = (["train", "validation"], False) if way.of_inputs else (["validation"], labels == "rows")
    # What is refused is refused before the base is loaded.
    for expert in opened:
        _own_examples(expert, data, rows, splits, targets)
    model: Any = opened_base.load(given.dtype or "float32")
    data.fit_context(context_length(model))
    examples = [_own_examples(expert, data, rows, splits, targets) for expert in opened]
    model.to(device())
    if labels == "experts":
        examples = _answered(model, opened, examples, data, given.max_new_tokens)
    batches = [batches_by_length(own, data) for own in examples]
    facts = {"split": "kept inputs" if given.data is None else " and ".join(splits), "max_length": data.max_length}
    facts |= {"labels": labels} if labels == "experts" else {}
    stored = []
    measured = way.measure(model, opened, batches, list(union_of_weights(opened)), steps=steps, progress=progress)
    for expert, own, found in zip(opened, examples, measured, strict=True):
        tasks, tokens = Counter(row.task for row in own), sum(len(row.tokens.ids) for row in own)
        among = opened if way.together else ()
        stored.append(
            write_statistics(expert, kind, found.items(), tasks, facts | {"tokens": tokens}, among, overwrite)
        )
    return stored


def _answered(
    model: Any, experts: Sequence[StoredExpert], examples: Sequence[list[Example]], data: TaskMixture, tokens: int
) -> list[list[Example]]:
    """Return the rows of each expert with its own answers as targets."""
    tokenizer: Any = data.tokenizer
    collate, found = Collator(RowTokenizer(tokenizer).pad_id), []
    for expert, own in zip(experts, examples, strict=True):
        with applied(model, expert, check=False):
            found.append(answered(model, tokenizer, own, collate, data.eval_batch_size, data.longest, tokens))
    return found


def batches_by_length(examples: Sequence[Example], data: TaskMixture) -> list[Batch]:
    """Return padded batches of some rows of a mixture, the shortest first, so that they need little padding."""
    collate = Collator(RowTokenizer(data.tokenizer).pad_id)
    ordered = ExampleSet(sorted(examples, key=lambda example: len(example.tokens.ids)))
    # Without a generator of its own, a loader would draw from the global one.
    return list(DataLoader(ordered, data.eval_batch_size, collate_fn=collate, generator=torch.Generator()))


def _own_examples(
    expert: StoredExpert, data: TaskMixture, rows: int, splits: list[str], targets: bool
) -> list[Example]:
    """Return rows of the tasks that an expert was trained on, task after task."""
    trained_on = list(map(str, expert.record["tasks"]))
    found = data.validation_examples() if targets else data.input_examples(splits)
    by_task = {task: examples for task, examples in found.items() if task in trained_on}
    if not by_task:
        source, place = expert.record.get("source"), expert.path
        was, way = "was trained on", "give its tasks the names that they had in training"
        if source:  # no adapter records its tasks
            place, was = source["id"], "counts as trained on"
            first = next(iter(data.roles))
            way = f"give its task's file, too; if it was trained on {first}, say so, and name DIR in its place: "
            way += f"modular-experts import {place} --tasks {first} --out DIR"
        raise ValueError(
            f"{place} {was} {', '.join(trained_on) or 'no task that its record names'}, and the task files have "
            f"{' or '.join(splits)} rows of {', '.join(data.roles)} only; {way}"
        )
    return [row for task in by_task.values() for row in spread_evenly(task, rows)]
