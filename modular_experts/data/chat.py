"""Tokenise conversations with the tokenizer's chat template, and find the assistant's turns in them.

If the template marks no turns by `{% generation %}`, a turn is the text that it adds to the template of the messages
before it; a row whose template does not begin with theirs is refused.
"""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, cached_property
from hashlib import blake2b
from typing import Any, NamedTuple

import jinja2
import torch
from transformers import PreTrainedTokenizerBase

from modular_experts.data.batch import Example, Tokens
from modular_experts.data.rows import BadRow, Message, Row, Tools
from modular_experts.library import StoredExpert, training_in_common

log = logging.getLogger(__name__)

Messages = Sequence[Message]


class ConversationTokenizer:
    """Tokenises rows of messages.

    A conversation of more than `max_length` tokens loses its oldest turns, whole ones, up to the next message of the
    user; a system message at its start stays. If the last turn of the assistant with the messages that it answers is
    still too long, tokens are lost on the left. Where the template ends turns with no special token, end-of-sequence
    follows the last answer, so that there is an end to learn.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        max_length: The most tokens of a row.
        filled: For errors: the limit that an answer fills, and the advice for this case.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, filled: str = "") -> None:
        if tokenizer.chat_template is None:
            raise ValueError(
                "rows of messages need a chat template, and the tokenizer has none; take a tokenizer that has "
                "(data.tokenizer, for example of the base's instruction-tuned sibling), or rows of input and target"
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._filled = filled
        template = str(tokenizer.get_chat_template())
        self._marks_turns = re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None

    @cached_property
    def _own_end(self) -> int | None:
        """The special token by which the template ends a turn of the assistant, if it does."""
        text = self._render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]).rstrip()
        last = self._ids(text)[-1]
        if last in self.tokenizer.added_tokens_decoder:
            return last
        if not text.endswith("b"):
            warn_once(
                "the chat template ends turns with plain text instead of a special token, so answers hold it and "
                "match no target; add it to the special tokens of the tokenizer"
            )
        return None

    @property
    def end(self) -> int:
        """The token that ends a turn of the assistant: the template's own, or end-of-sequence if it has none."""
        return self.tokenizer.eos_token_id if self._own_end is None else self._own_end

    def __call__(
        self, task: str, rows: Sequence[Row], learn: bool, choices: bool = False
    ) -> tuple[list[Example], int, list[str]]:
        """Tokenise conversations, with the arguments and results of `RowTokenizer`, perhaps with their choices."""
        examples: list[Example] = []
        problems: list[str] = []
        cut = 0
        for row in rows:
            try:
                tokens, is_cut = self._row(row, learn)
                compared = self._choices(row) if choices else ()
            except (BadRow, jinja2.TemplateError) as error:
                sentence = " ".join(str(error).split())
                if isinstance(error, jinja2.TemplateError):
                    sentence = f"the chat template refuses the conversation: {sentence}"
                problems.append(f"{row.where}: {sentence}")
                continue
            cut += is_cut
            correct = row.choices.index(str(row.target)) if row.choices else 0
            examples.append(Example(task, row.input, row.target, tokens, compared, correct, self.end, len(examples)))
        return examples, cut, problems

    def _choices(self, row: Row) -> tuple[Tokens, ...]:
        """Return the conversation with each of its choices as the last answer, all with the same prompt."""
        answers = row.answers or [{"role": "assistant", "content": choice} for choice in row.choices]
        talks = [replace(row, messages=(*row.messages[:-1], answer)) for answer in answers]
        choices = tuple(self._row(talk, learn=False)[0] for talk in talks)
        if len({tuple(choice.ids[: choice.prompt].tolist()) for choice in choices}) > 1:
            raise BadRow(f"an answer to compare with another one fills {self._filled}")
        return choices

    def _row(self, row: Row, learn: bool) -> tuple[Tokens, bool]:
        """Return the tokens of a conversation that fit into a row, and whether others are cut off."""
        talk = row
        ids, answers = self._tokens(talk)
        while len(ids) > self.max_length and (shorter := _without_oldest(talk.messages)):
            talk = replace(talk, messages=tuple(shorter))
            ids, answers = self._tokens(talk)
        start = len(ids)
        while start and answers[start - 1]:
            start -= 1
        first = max(0, len(ids) - self.max_length)
        if start <= first:
            raise BadRow(f"the assistant's last turn fills {self._filled}")
        labelled = torch.tensor([learn and answer for answer in answers[first:]])
        # Nothing predicts the first token.
        labelled[0] = False
        kept = torch.tensor(ids[first:], dtype=torch.int32)
        is_cut = len(ids) > self.max_length or len(talk.messages) < len(row.messages)
        return Tokens(kept, start - first, labelled if learn else None), is_cut

    def _tokens(self, row: Row) -> tuple[list[int], list[bool]]:
        """Return the tokens of a conversation, and which of them the assistant says."""
        if row.target is None:
            ids = self._ids(prompt_text(self.tokenizer, row.messages, row.tools))
            return ids, [False for _ in ids]
        ids, answers = self._marked_turns(row) if self._marks_turns else self._compared_turns(row)
        if not any(answers):
            return ids, answers
        # What the template writes behind the last answer is neither read nor learned.
        stop = len(answers) - answers[::-1].index(True)
        if self._own_end is None:
            return [*ids[:stop], self.end], [*answers[:stop], True]
        return ids[:stop], answers[:stop]

    def _marked_turns(self, row: Row) -> tuple[list[int], list[bool]]:
        """Return what `_tokens` does, by the marks of the template."""
        marked: Any = self.tokenizer.apply_chat_template(
            list(row.messages), row.tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        answers = [bool(mark) for mark in marked["assistant_masks"]]
        if not any(answers):
            raise BadRow("the chat template marks no turn of the assistant ({% generation %})")
        return list(marked["input_ids"]), answers

    def _compared_turns(self, row: Row) -> tuple[list[int], list[bool]]:
        """Return what `_tokens` does, by the text that the template adds with each turn."""
        text = self._render(row.messages, row.tools)
        turns = self._turns(row, text)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        # A token that begins before an answer is one of the answer if it holds more of it than white space.
        answers = [
            any(start < stop and (first <= start or text[first:end].strip()) for first, stop in turns)
            for start, end in encoded["offset_mapping"]
        ]
        return list(encoded["input_ids"]), answers

    def _turns(self, row: Row, text: str) -> list[tuple[int, int]]:
        """Return where each turn of the assistant begins and ends in the text of a conversation."""
        turns = []
        messages = row.messages
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = prompt_text(self.tokenizer, messages[:number], row.tools)
            after = self._render(messages[: number + 1], row.tools)
            if not (text.startswith(after) and after.startswith(before)):
                raise BadRow(
                    f"the chat template writes message {number + 1} differently once others follow or precede it, so "
                    "the assistant's turns cannot be told from the rest; put {% generation %} and {% endgeneration %} "
                    "around them in tokenizer.chat_template, or give rows of input and target"
                )
            # White space behind the token that ends a turn belongs to the next turn.
            spoken = after.rstrip()
            spoken = after if spoken.endswith(message["content"].rstrip()) else spoken
            turns.append((len(before), len(spoken)))
        return turns

    def _render(self, messages: Messages, tools: Tools = None) -> str:
        return str(self.tokenizer.apply_chat_template(list(messages), tools, tokenize=False))

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def prompt_text(tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools = None) -> str:
    """Return the text that asks for the next answer; a space at its end is left to an answer whose word it joins."""
    text = str(tokenizer.apply_chat_template(list(messages), tools, tokenize=False, add_generation_prompt=True))
    joins = text.endswith(" ") and len(tokenizer("a a", add_special_tokens=False)["input_ids"]) < 3
    return text.removesuffix(" ") if joins else text


@cache
def warn_once(sentence: str) -> None:
    """Log a sentence about the data once in a process, which may read them for several models."""
    log.warning(sentence)


class PromptReading(NamedTuple):
    """A prompt as a model reads it: its tokens, those that end an answer, and whether the chat template made it."""

    ids: list[int]
    ends: list[int]
    is_chat: bool


class PromptReadings(NamedTuple):
    """A prompt as each of several experts reads it.

    Attributes:
        by_form: The prompt through the chat template (True), without it (False), or both where experts differ.
        members: The form in which each expert reads it.
        base: The form in which the base alone reads it.
    """

    by_form: dict[bool, PromptReading]
    members: list[bool]
    base: bool


def adds_to_prompts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a base reads prompts with the special tokens that its tokenizer adds, as encoders do."""
    return getattr(tokenizer, "adds_to_prompts", False)


def classifies(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a base answers with one of the classes of a task."""
    return getattr(tokenizer, "classifies", False)


def encoded(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages, chat: bool) -> PromptReading:
    """Return a prompt as a model reads it, with `chat` as the chat template makes it."""
    ends = ends_of_answers(tokenizer, chat)
    if isinstance(prompt, str) and not prompt.strip():
        raise ValueError("the prompt is empty; give the text to answer")
    if chat:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        try:
            prompt = prompt_text(tokenizer, messages)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from error
    how = {"add_special_tokens": adds_to_prompts(tokenizer), "truncation": classifies(tokenizer)}
    ids = list(tokenizer(prompt, **how)["input_ids"])
    if not ids:
        raise ValueError("the prompt is empty for the model: the chat template or the tokenizer leaves nothing of it")
    return PromptReading(ids, ends, chat)


def read_as_each(
    tokenizer: PreTrainedTokenizerBase, text: str, messages: Messages, experts: Sequence[StoredExpert]
) -> PromptReadings:
    """Return a prompt as each of the experts behind a router was trained to read it.

    Experts that were trained without the chat template read the `text`, and the template gets the `messages`. Use it
    for prompts whose form the asker leaves to the model, such as the messages of a chat.
    """
    members = [reads_chat(tokenizer, [expert]) for expert in experts]
    forms = set(members)
    # Where all experts read alike, the base, which answers rejected prompts, reads as they do: so does a test of the
    # route. Where they differ, it reads as it does alone.
    base = forms.pop() if len(forms) == 1 else reads_chat(tokenizer, [])
    by_form = {is_chat: encoded(tokenizer, messages if is_chat else text, is_chat) for is_chat in {*members, base}}
    return PromptReadings(by_form, members, base)


def reads_chat(tokenizer: PreTrainedTokenizerBase, experts: Sequence[StoredExpert]) -> bool:
    """Return whether experts were trained with the chat template; for the base alone, whether there is one."""
    trained = not experts or training_in_common(experts).get("chat_template")
    return bool(tokenizer.chat_template is not None and trained)


def ends_of_answers(tokenizer: PreTrainedTokenizerBase, chat: bool) -> list[int]:
    """Return the tokens that end an answer, with a chat template or without."""
    ends = [tokenizer.eos_token_id, ConversationTokenizer(tokenizer, 0).end if chat else None]
    return list(dict.fromkeys(end for end in ends if end is not None))


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of a tokenizer's chat template, by which records name it."""
    template = json.dumps(tokenizer.chat_template, sort_keys=True)
    return blake2b(template.encode(), digest_size=8).hexdigest()


def _without_oldest(messages: Messages) -> list[Message]:
    system = list(messages[:1]) if messages[0]["role"] == "system" else []
    users = [number for number, message in enumerate(messages) if message["role"] == "user"]
    return [*system, *messages[users[1] :]] if len(users) > 1 else []
