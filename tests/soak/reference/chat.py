"""Render conversations literally, template by template, and mark what the assistant says."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from soak.reference.model import Text, answered

Message = dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """A part of a rendered conversation, and whether the assistant says it."""

    text: str
    spoken: bool = False


@dataclass(frozen=True)
class Template:
    """A chat template for transformers, and a function that renders conversations as it does.

    `end` closes a turn of the assistant; None is a template without a special token there.
    """

    source: str
    render: Callable[[Sequence[Message]], list[Piece]]
    end: str | None = "</s>"


def _simple(messages: Sequence[Message]) -> list[Piece]:
    pieces = []
    for message in messages:
        pieces.append(Piece(f"<|{message['role']}|>"))
        if message["role"] == "assistant":
            pieces += [Piece(message["content"] + "</s>", spoken=True), Piece("\n")]
        else:
            pieces.append(Piece(message["content"] + "\n"))
    return pieces


def _with_system(messages: Sequence[Message]) -> list[Piece]:
    if messages[0]["role"] == "system":
        return _simple(messages)
    return [Piece("<|system|>help\n"), *_simple(messages)]


def _open(messages: Sequence[Message]) -> list[Piece]:
    pieces = []
    for message in messages:
        pieces += [Piece(f"{message['role']}: "), Piece(message["content"] + "\n", message["role"] == "assistant")]
    return pieces


def _with_tools(messages: Sequence[Message]) -> list[Piece]:
    shown = []
    for message in messages:
        calls = [call["function"] for call in message.get("tool_calls") or []]
        texts = [f"[{call['name']} {json.dumps(call['arguments'], ensure_ascii=False)}]" for call in calls]
        shown.append({**message, "content": message["content"] + "".join(texts)})
    return _simple(shown)


_LINE = "{{ '\\n' }}"
_CALLS = "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}"
_ASKED = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
_SIMPLE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    + "{% if m.role == 'assistant' %}</s>{% endif %}"
    + _LINE
    + "{% endfor %}"
    + _ASKED
)
TEMPLATES = {
    "simple": Template(_SIMPLE, _simple),
    "system": Template(
        "{% if messages[0].role != 'system' %}<|system|>help" + _LINE + "{% endif %}" + _SIMPLE, _with_system
    ),
    "marked": Template(
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
        + "{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
        + _LINE
        + "{% endfor %}"
        + _ASKED,
        _simple,
    ),
    "tools": Template(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}"
        + _CALLS
        + "</s>{% endif %}"
        + _LINE
        + "{% endfor %}"
        + _ASKED,
        _with_tools,
    ),
    "open": Template(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}"
        + _LINE
        + "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
        _open,
        None,
    ),
}


@dataclass
class ConversationReader:
    """Turns conversations into tokens; a row has `messages`."""

    base: Path
    longest: int
    template: Template

    def __post_init__(self) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.base)
        self.end: int = self.tokenizer.eos_token_id

    def texts(self, row: dict[str, Any], choices: bool = False) -> tuple[Text, list[Text]]:
        """Return all before the last turn of the assistant as a prompt, and this turn as its answer."""
        ids, spoken = self._fitted(row["messages"])
        start = _start_of_last_turn(spoken)
        return answered(ids[:start], ids[start:]), []

    def learned(self, row: dict[str, Any]) -> Text:
        """Return a conversation in which each turn of the assistant is learned, if a token comes before it."""
        ids, spoken = self._fitted(row["messages"])
        return Text(tuple(ids), tuple(place for place, is_spoken in enumerate(spoken) if is_spoken and place))

    def _fitted(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Leave out the oldest turns, then the first tokens, until a conversation is short enough."""
        ids, spoken = self._tokens(messages)
        while len(ids) > self.longest:
            users = [number for number, message in enumerate(messages) if message["role"] == "user"]
            if len(users) < 2:
                break
            kept = [messages[0]] if messages[0]["role"] == "system" else []
            messages = [*kept, *messages[users[1] :]]
            ids, spoken = self._tokens(messages)
        return ids[-self.longest :], spoken[-self.longest :]

    def _tokens(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Return the tokens up to the end of the last turn of the assistant, and which of them it says."""
        ids: list[int] = []
        spoken: list[bool] = []
        pieces = self.template.render(messages)
        last = max(number for number, piece in enumerate(pieces) if piece.spoken)
        for piece in pieces[: last + 1]:
            more = self.tokenizer(piece.text, add_special_tokens=False)["input_ids"]
            ids += more
            spoken += [piece.spoken] * len(more)
        if self.template.end is None:
            ids.append(self.end)
            spoken.append(True)
        return ids, spoken


def _start_of_last_turn(spoken: Iterable[bool]) -> int:
    flags = list(spoken)
    start = len(flags)
    while start and flags[start - 1]:
        start -= 1
    return start
