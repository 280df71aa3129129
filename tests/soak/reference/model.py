"""Read rows as tokens, score them and answer them one at a time, in plain PyTorch and transformers."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

Row = dict[str, Any]
Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Text:
    """Tokens that a model reads, and the places of the learned ones, each of which the token before it predicts."""

    ids: tuple[int, ...]
    learned: tuple[int, ...]

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.ids[: self.learned[0]]


def answered(prompt: Sequence[int], answer: Sequence[int]) -> Text:
    """Return a prompt with an answer, all of which is learned."""
    return Text((*prompt, *answer), tuple(range(len(prompt), len(prompt) + len(answer))))


@dataclass(frozen=True)
class Answer:
    """A greedy answer, and by how much the likeliest token led at the closest step: rounding can turn a tiny lead.

    `text` has no white space at its ends, and `raw` does.
    """

    raw: str
    lead: float

    @property
    def text(self) -> str:
        return self.raw.strip()


@dataclass
class Reader:
    """Turns rows into tokens as `docs/guides/data.md` describes it."""

    base: Path
    longest: int
    chat_template: bool = False

    def __post_init__(self) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.base)
        self.end: int = self.tokenizer.eos_token_id

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def texts(self, row: Row, choices: bool = True) -> tuple[Text, list[Text]]:
        """Return the row with its target, and with each of its choices; all have the same prompt."""
        prompt = row["input"]
        if self.chat_template:
            messages = [{"role": "user", "content": prompt}]
            prompt = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        answers = [row["target"], *(row.get("choices", []) if choices else [])]
        joints = ["" if prompt[-1:].isspace() or answer[:1].isspace() else " " for answer in answers]
        ends = [[*self.ids(joint + answer), self.end] for joint, answer in zip(joints, answers, strict=True)]
        ids = self.ids(prompt)
        left_out = max(0, len(ids) + max(map(len, ends)) - self.longest)
        target, *others = [answered(ids[left_out:], end) for end in ends]
        return target, others


def negative_log_likelihood(logits_of: Logits, text: Text) -> Tensor:
    """Return the sum over learned tokens in nats; `logits_of` gives `(1, length, vocabulary)` for `(1, length)`."""
    ids, places = torch.tensor(text.ids), torch.tensor(text.learned)
    log_probabilities = logits_of(ids[None])[0].float().log_softmax(-1)
    return -log_probabilities[places - 1, ids[places]].sum()


def place_of(name: str) -> tuple[str, int | None]:
    """Return the name of the parameter, and the number of the matrix in it for a name such as `down_proj[2]`."""
    owner, bracket, number = name.removesuffix("]").partition("[")
    return owner, int(number) if bracket else None


class Reference:
    """A base with any deltas added to its weights.

    Args:
        base: The folder.
        context: How many tokens the base can read.
        deltas: Changes of weights by name; `name[2]` is the third matrix of a weight of three dimensions.
    """

    def __init__(self, base: Path, context: int, deltas: Mapping[str, Tensor] | None = None) -> None:
        self.base, self.context = base, context
        self.model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(base)
        self.add(deltas or {})

    def add(self, deltas: Mapping[str, Tensor]) -> None:
        """Add deltas to the weights."""
        with torch.no_grad():
            for name, delta in deltas.items():
                weight = self.weight(name)
                weight.copy_(weight.double() + delta)

    def weight(self, name: str) -> Tensor:
        owner, number = place_of(name)
        weight = self.model.get_parameter(owner)
        return weight if number is None else weight[number]

    def logits(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits

    @torch.no_grad()
    def loss(self, text: Text) -> float:
        """Return the sum over learned tokens in nats."""
        return negative_log_likelihood(self.logits, text).item()

    @torch.no_grad()
    def answer(self, prompt: Sequence[int], most: int, ends: Sequence[int] = ()) -> Answer:
        """Return the likeliest tokens one after another, until an end, `most` tokens, or the context's end."""
        read = list(prompt)[max(0, len(prompt) + 1 - self.context) :]
        stops = {self.tokenizer.eos_token_id, *ends}
        written: list[int] = []
        lead = math.inf
        for _ in range(min(most, self.context - len(read))):
            best = self.logits(torch.tensor([read + written]))[0, -1].topk(2)
            lead = min(lead, (best.values[0] - best.values[1]).item())
            written.append(int(best.indices[0]))
            if written[-1] in stops:
                break
        kept = written[:-1] if written and written[-1] in stops else written
        text = self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Answer(text, lead)
