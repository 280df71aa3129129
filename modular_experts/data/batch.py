"""Define the batch, in which data and training meet, and the protocol of all that training asks of its data.

A batch is a dict, for `n` rows padded on the right to the longest, `length`:

    input_ids       (n, length) int64; the prompt, the target, end-of-sequence, padding
    attention_mask  (n, length) int64; 1 on tokens and 0 on padding, by its place and never by a token's id
    labels          (n, length) int64; the id at the places of the target and its end-of-sequence, IGNORED elsewhere; a
                    conversation that is trained on has such places in each of the assistant's turns
    task            list of n names; "" marks a filler row, which no score and no loss counts (see `is_filler`)

The prompt of a row is its tokens before the first labelled one; the target of a conversation that is validated or
tested is the assistant's last turn, and its prompt is all before.

A packed batch, which training gets, and evaluation makes of a padded one (`repacked`), holds the same `n` rows one
behind the other in `p` packs, all padded to the longest, `length`; no row goes on in another pack:

    input_ids       (p, length) int64
    position_ids    (p, length) int64; the place of a token in its row; padding is counted like a row of its own
    labels          (p, length) int64; as above, so never at the first token of a row
    row             (p, length) int64; the row that a token belongs to, and -1 on padding
    task            list of n names

Where positions start anew and no attention mask is given, a model of transformers keeps rows apart. A packed batch has
no `attention_mask`, so code that knows only the other form fails. Training batches of which several make an optimizer
step carry their number, `step_batches`, and the sum of their `loss_terms` in this process, `step_terms`. Batches of
validation, test and prediction carry

    input, target   lists of n texts as in the data, after the task's template; a row to predict may have None as target
    end             list of n ids: the token that ends an answer
    number          list of n numbers, a row's place among the rows of its task and split
    choices         only if a row has choices: a dict of input_ids, attention_mask and labels for all m choices of all
                    rows, row (m,) int64, the row that a choice belongs to, and correct (m,) bool
"""

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

IGNORED = -100
FILLER = -1
LITTLE_PADDING = 0.05
PACK_LENGTH = 1024
MOST_BATCHES = 500
"""The number of batches of an epoch that are inspected to find the typical and the longest one."""

Batch = dict[str, Any]
Ids = TypeVar("Ids", list[int], Tensor)


@dataclass(frozen=True, eq=False)
class Tokens:
    """A prompt and the tokens after it: `ids` `(length,)`, of which the first `prompt` are the prompt.

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
    """A tokenised row; `choices` are the row's prompt with each choice in the target's place, `end` ends an answer.

    `shots` demonstrations stand in the prompt before the row's own.
    """

    task: str
    input: str
    target: str | None
    tokens: Tokens
    choices: tuple[Tokens, ...] = ()
    correct: int = 0
    end: int | None = None
    number: int = 0
    shots: int = 0


def fitted(prompt: Ids, answer: int, longest: int) -> Ids:
    """Return a prompt that leaves room for `answer` tokens in a row of `longest`: all of it, or its last tokens."""
    return prompt[max(0, len(prompt) + answer - longest) :]


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


@dataclass
class Collator:
    """Makes a batch of examples, padded with `pad_id`; in training without `texts`.

    With `pack_length` the batch is packed, in packs of at most that many tokens, or of the longest row.
    """

    pad_id: int
    texts: bool = True
    pack_length: int | None = None

    def __call__(self, examples: Sequence[Example]) -> Batch:
        rows = [example.tokens for example in examples]
        if self.pack_length is None:
            batch = _padded(rows, self.pad_id)
        else:
            batch = _packed(rows, packs([len(row.ids) for row in rows], self.pack_length), self.pad_id)
        batch["task"] = [example.task for example in examples]
        if self.texts:
            batch["input"] = [example.input for example in examples]
            batch["target"] = [example.target for example in examples]
            batch["end"] = [example.end for example in examples]
            batch["number"] = [example.number for example in examples]
        if choices := [choice for example in examples for choice in example.choices]:
            counts = torch.tensor([len(example.choices) for example in examples])
            correct = [number == example.correct for example in examples for number in range(len(example.choices))]
            batch["choices"] = _padded(choices, self.pad_id) | {
                "row": torch.arange(len(examples)).repeat_interleave(counts),
                "correct": torch.tensor(correct),
            }
        return batch


def size_of(batch: Batch) -> int:
    """Return the places of a batch, padding among them."""
    return batch["input_ids"].numel()


def loss_terms(batch: Batch) -> int:
    """Return how many terms the loss of a training batch has: predicted tokens, or pairs where rows have choices."""
    terms = ~batch["choices"]["correct"] if "choices" in batch else batch["labels"][:, 1:] != IGNORED
    return int(terms.sum())


def is_filler(batch: Batch) -> list[bool]:
    """Return of each row whether it is a filler, which keeps processes in step and counts in no score or file."""
    return [task == "" for task in batch["task"]]


def prompts_of(batch: Batch) -> list[Tensor]:
    """Return the prompt of each row, unpadded; a row without labels is all prompt."""
    labelled = batch["labels"] != IGNORED
    lengths = batch["attention_mask"].sum(1)
    starts = torch.where(labelled.any(1), labelled.int().argmax(1), lengths)
    return [ids[:start] for ids, start in zip(batch["input_ids"], starts.tolist(), strict=True)]


class EncoderInputs(NamedTuple):
    """How an encoder-decoder reads a padded batch: the prompts in the encoder, all that follows them in the decoder.

    Attributes:
        ids: The tokens of the prompts, `(n, longest prompt)` int64, padded on the right.
        mask: 1 on these tokens, `(n, longest prompt)` int64.
        decoder_ids: The token before each that follows, `(n, longest answer)` int64; a start token comes first.
        decoder_mask: 1 where a token follows, `(n, longest answer)` int64.
        labelled: Where the decoder predicts a labelled token, `(n, longest answer)` bool, in the order of the batch.
    """

    ids: Tensor
    mask: Tensor
    decoder_ids: Tensor
    decoder_mask: Tensor
    labelled: Tensor


def encoder_inputs(batch: Batch, start: int, pad: int = 0) -> EncoderInputs:
    """Divide a padded batch between encoder, padded with `pad`, and decoder, which begins with the token `start`."""
    labels = batch["labels"]
    mask = batch["attention_mask"]
    prompt = (labels != IGNORED).cumsum(1).eq(0) & mask.bool()
    prompts = prompt.sum(1, keepdim=True)
    answers = mask.sum(1, keepdim=True) - prompts
    longest = int(prompts.max())
    steps = torch.arange(max(1, int(answers.max())), device=labels.device)[None]
    places = (prompts + steps).clamp(max=labels.shape[1] - 1)
    following = batch["input_ids"].gather(1, places)
    follows = steps < answers
    labelled = (labels.gather(1, places) != IGNORED) & follows
    decoder_ids = torch.cat([torch.full_like(following[:, :1], start), following[:, :-1]], 1)
    # The number of a class would lie outside of the embeddings.
    ids = batch["input_ids"][:, :longest].masked_fill(~prompt[:, :longest], pad)
    return EncoderInputs(ids, prompt[:, :longest].long(), decoder_ids, follows.long(), labelled)


class AnswerInputs(NamedTuple):
    """How a model whose experts act on answers alone reads a padded batch.

    Attributes:
        prompts: The prompts, which the base reads, `(n, width)` int64, padded on the left.
        prompt_mask: 1 on these tokens, `(n, width)` int64.
        ids: The last token of each prompt, and its answer without its last token, `(n, longest answer)` int64.
        mask: 1 where a token follows, `(n, longest answer)` int64.
        places: The places of `ids` in their rows, `(n, longest answer)` int64.
        labelled: Where the model predicts a labelled token, `(n, longest answer)` bool, in the order of the batch.
    """

    prompts: Tensor
    prompt_mask: Tensor
    ids: Tensor
    mask: Tensor
    places: Tensor
    labelled: Tensor


def answer_inputs(batch: Batch) -> AnswerInputs:
    """Divide a padded batch behind the last token but one of each prompt.

    Raises:
        ValueError: A row has several answers, as a conversation has that is trained on.
    """
    # Nothing predicts the first token of a row, so it belongs to the prompt.
    labels = torch.cat([torch.full_like(batch["labels"][:, :1], IGNORED), batch["labels"][:, 1:]], 1)
    divided = encoder_inputs(batch | {"labels": labels}, 0)
    goes_on = (~divided.labelled).cumsum(1) > 0
    if bool((divided.labelled & goes_on).any()):
        raise ValueError(
            "a row has several answers with other tokens between them, and experts that act on answers alone take one "
            "answer behind one prompt; give each of the assistant's turns a row of its own"
        )
    lengths = divided.mask.sum(1, keepdim=True)
    ids = torch.cat([divided.ids.gather(1, lengths - 1), divided.decoder_ids[:, 1:]], 1)
    # The last token is read with the answer.
    width = int(lengths.max())
    shifted = torch.arange(width, device=ids.device) - width + lengths
    places = lengths - 1 + torch.arange(ids.shape[1], device=ids.device)
    prompts = divided.ids.gather(1, shifted.clamp(min=0))
    return AnswerInputs(prompts, (shifted >= 0).long(), ids, divided.decoder_mask, places, divided.labelled)


def repacked(batch: Batch) -> Batch:
    """Return the tokens of a padded batch as a packed batch, in packs of at most `PACK_LENGTH` tokens or a row."""
    lengths = batch["attention_mask"].sum(1).tolist()
    rows = [
        Tokens(ids[:length], 0, labels[:length] != IGNORED)
        for ids, labels, length in zip(batch["input_ids"].cpu(), batch["labels"].cpu(), lengths, strict=True)
    ]
    # Some models warn of a token for padding where they get no mask.
    packed = _packed(rows, packs(lengths, PACK_LENGTH), pad_id=int(rows[0].ids[0]))
    moved = {name: column.to(batch["input_ids"].device) for name, column in packed.items()}
    return moved | {"task": batch.get("task", ["" for _ in rows])}


def packs(lengths: Sequence[int], longest: int) -> list[list[int]]:
    """Divide rows among packs, and return the rows of each pack.

    Rows go, the longest first, to the pack that is the shortest so far. The number of packs is halved until at most a
    twentieth of the batch is padding, for attention may cost the square of a pack's length. If packs of at most
    `longest` tokens do not reach that, the number with the least padding is taken.
    """
    ordered = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    best = [[row] for row in range(len(lengths))]
    least = 1.0
    count = len(lengths)
    while True:
        # The heap holds the tokens and the number of each pack, the shortest pack first.
        shortest = [(0, pack) for pack in range(count)]
        divided: list[list[int]] = [[] for _ in range(count)]
        for row in ordered:
            tokens, pack = shortest[0]
            heapq.heapreplace(shortest, (tokens + lengths[row], pack))
            divided[pack].append(row)
        width = max(shortest)[0]
        padding = 1 - sum(lengths) / (count * width)
        if width > max(longest, *lengths):
            return best
        if padding < least:
            best = [sorted(rows) for rows in divided]
            least = padding
        if least <= LITTLE_PADDING or count == 1:
            return best
        count = -(-count // 2)


def _packed(rows: Sequence[Tokens], divided: Sequence[Sequence[int]], pad_id: int) -> Batch:
    longest = max(sum(len(rows[number].ids) for number in pack) for pack in divided)
    ids: list[Tensor] = []
    places: list[Tensor] = []
    labels: list[Tensor] = []
    owners: list[Tensor] = []
    for pack in divided:
        padding = longest - sum(len(rows[number].ids) for number in pack)
        parts = [*(rows[number] for number in pack), Tokens(torch.full((padding,), pad_id), padding)]
        lengths = [len(part.ids) for part in parts]
        ids.append(torch.cat([part.ids for part in parts]))
        labels.append(torch.cat([part.labels for part in parts]))
        places.append(torch.cat([torch.arange(length) for length in lengths]))
        owners.append(torch.tensor([*pack, -1]).repeat_interleave(torch.tensor(lengths)))
    columns = {"input_ids": ids, "position_ids": places, "labels": labels, "row": owners}
    batch = {name: torch.stack(column).long() for name, column in columns.items()}
    # Nothing predicts the first token of a row, least of all the row before it.
    batch["labels"][batch["position_ids"] == 0] = IGNORED
    return batch


def _padded(rows: Sequence[Tokens], pad_id: int) -> Batch:
    ids = pad_sequence([row.ids.long() for row in rows], batch_first=True, padding_value=pad_id)
    mask = pad_sequence([torch.ones(len(row.ids), dtype=torch.int64) for row in rows], batch_first=True)
    labels = pad_sequence([row.labels for row in rows], batch_first=True, padding_value=IGNORED)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class DataSource:
    """What the data of a trainer tell about themselves; `TaskMixture` answers all of it.

    A LightningDataModule of your own subclasses it too, and sets or overrides what it knows.
    """

    batch_size: int = 0
    """Rows of a training batch, all processes together; 0 if that is not known."""
    tokenizer: str | PreTrainedTokenizerBase | None = None
    """What makes tokens of rows, and text of answers to them; None for the base's."""
    packing: bool | None = None
    """Whether training batches are packed; with None `choose_packing` may pack them."""

    def take_tokenizer(self, base: str, revision: str | None = None) -> PreTrainedTokenizerBase | None:
        """Read rows with the tokenizer of a base, unless the data have their own; return what reads them, if known."""
        return None if isinstance(self.tokenizer, str) else self.tokenizer

    @property
    def roles(self) -> Mapping[str, str]:
        """Each task's role, `held_in` or `held_out`, by name; scores and records name these tasks."""
        return {}

    @property
    def classes(self) -> Mapping[str, Sequence[str]]:
        """The classes of each held-in task, for a base that classifies."""
        return {}

    @property
    def contents(self) -> Mapping[str, object]:
        """What a record keeps of each held-in task's rows."""
        return {}

    @property
    def reading(self) -> Mapping[str, object]:
        """The settings by which rows become tokens, for a record."""
        return self.reading_of(self.roles)

    def reading_of(self, tasks: Iterable[str]) -> Mapping[str, object]:
        """Return `reading` for the rows of some tasks."""
        return {}

    def inputs(self, most: int) -> Mapping[str, Sequence[Example]]:
        """Return at most `most` training examples of all held-in tasks together, whose prompts an expert may keep."""
        return {}

    def fit_context(self, context: int | None) -> None:
        """Cut rows to the context of the model, which is loaded now; None for one without a limit."""

    def learn_choices(self, learns: bool = True) -> None:
        """Let training batches have the choices of their rows, too, for a loss that compares them; or else not."""

    def choose_packing(self, keeps_rows_apart: Callable[[], bool]) -> None:
        """Decide whether training batches are packed, if the model that is trained keeps packed rows apart."""


def source_of(trainer: Trainer | None) -> DataSource:
    """Return what the data of a trainer tell about themselves."""
    data = datamodule_of(trainer)
    return data if isinstance(data, DataSource) else DataSource()


def datamodule_of(trainer: Trainer | None) -> LightningDataModule | None:
    """Return the data module of a trainer; None if it was given loaders, or nothing yet."""
    return getattr(trainer, "datamodule", None)
