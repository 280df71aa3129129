"""Say the tokens of rows and conversations that were drawn."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from soak.reference.model import Text
from soak.tasks import Row


def answered(prompt: Sequence[int], answer: Sequence[int]) -> Text:
    """Return a prompt with an answer, all of which is learned."""
    return Text((*prompt, *answer), tuple(range(len(prompt), len(prompt) + len(answer))))


class Reader:
    """Turns rows into tokens as `docs/guides/data.md` describes it."""

    def __init__(self, base: Path, longest: int, chat_template: bool = False) -> None:
        self.longest, self.chat_template = longest, chat_template
        self.tokenizer: Any = AutoTokenizer.from_pretrained(base)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def texts(self, row: Row, choices: bool = True) -> tuple[Text, list[Text]]:
        """Return the row with its target, and with each of its choices; all have the same prompt."""
        prompt = row["input"]
        if self.chat_template:
            messages = [{"role": "user", "content": prompt}]
            prompt = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ends = []
        for answer in [row["target"], *(row.get("choices", []) if choices else [])]:
            joint = "" if prompt[-1:].isspace() or answer[:1].isspace() else " "
            ends.append([*self.ids(joint + answer), self.tokenizer.eos_token_id])
        ids = self.ids(prompt)
        left_out = max(0, len(ids) + max(map(len, ends)) - self.longest)
        target, *others = [answered(ids[left_out:], end) for end in ends]
        return target, others


class ConversationReader(Reader):
    """Turns conversations into tokens by a literal rendering of a template of `families/serving.py`.

    Each message is its role in an `opening`, its text with calls of tools, and a new line. An answer is followed by
    `</s>` before the new line if the template has `ends`, and the last one by the end of text if it does not. A
    conversation without a system message begins with `preface`.
    """

    def __init__(self, base: Path, longest: int, opening: str = "<|{}|>", preface: str = "", ends: bool = True) -> None:
        super().__init__(base, longest)
        self.opening, self.preface, self.ends = opening, preface, ends

    def texts(self, row: Row, choices: bool = True) -> tuple[Text, list[Text]]:
        """Return all before the last turn of the assistant as a prompt, and this turn as its answer."""
        ids, spoken = self._fitted(row["messages"])
        start = max((place for place, is_spoken in enumerate(spoken) if not is_spoken), default=-1) + 1
        return answered(ids[:start], ids[start:]), []

    def learned(self, row: Row) -> Text:
        """Return a conversation in which each turn of the assistant is learned, if a token comes before it."""
        ids, spoken = self._fitted(row["messages"])
        return Text(tuple(ids), tuple(place for place, is_spoken in enumerate(spoken) if is_spoken and place))

    def _fitted(self, messages: Sequence[Row]) -> tuple[list[int], list[bool]]:
        """Leave out the oldest turns, then the first tokens, until a conversation is short enough."""
        ids, spoken = self._tokens(messages)
        users = [number for number, message in enumerate(messages) if message["role"] == "user"]
        if len(ids) > self.longest and len(users) > 1:
            kept = [message for message in messages[:1] if message["role"] == "system"]
            return self._fitted([*kept, *messages[users[1] :]])
        return ids[-self.longest :], spoken[-self.longest :]

    def _tokens(self, messages: Sequence[Row]) -> tuple[list[int], list[bool]]:
        """Return the tokens up to the end of the last answer, and which of them the assistant says."""
        pieces = [] if messages[0]["role"] == "system" else [(self.preface, False)]
        for message in messages:
            text = message["content"]
            for call in message.get("tool_calls", []):
                function = call["function"]
                text += f"[{function['name']} {json.dumps(function['arguments'], ensure_ascii=False)}]"
            is_answer = message["role"] == "assistant"
            pieces.append((self.opening.format(message["role"]), False))
            if is_answer and self.ends:
                pieces += [(text + "</s>", True), ("\n", False)]
            else:
                pieces.append((text + "\n", is_answer))
        # The new line behind the last answer is left out.
        pieces = pieces[:-1] if self.ends else [*pieces, ("</s>", True)]
        ids: list[int] = []
        spoken: list[bool] = []
        for text, is_spoken in pieces:
            more = self.ids(text)
            ids += more
            spoken += [is_spoken] * len(more)
        return ids, spoken
