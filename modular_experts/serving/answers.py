"""Turn requests into answers: tokenise the prompt, choose who answers, and decode the tokens as they come."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import NamedTuple, cast

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from modular_experts.data.chat import PromptReading, PromptReadings, encoded, ends_of_answers, read_as_each, reads_chat
from modular_experts.evaluation.generation import answer_room
from modular_experts.serving.engine import Engine, Sampling, SideThreads, Token
from modular_experts.serving.models import ChosenExperts, Models, Route

Prompt = str | list[int] | list[dict[str, str]]
MOST_TOKENS = 256
"""The most tokens of an answer to a request that does not say."""


class AnswerPart(NamedTuple):
    """A part of an answer: its text, its tokens, and at the end why it ends (`stop` or `length`)."""

    text: str
    tokens: Sequence[Token] = ()
    finish: str | None = None


Parts = AsyncGenerator[AnswerPart, None]
"""The parts of an answer as they come; who leaves them early closes them, which ends the answer."""


@dataclass
class Answer:
    """An answer that is about to be written: close its `parts` to end it; `tokens` counts those that are written."""

    choice: ChosenExperts
    prompt_tokens: int
    parts: Parts = field(init=False)
    tokens: int = 0

    @property
    def usage(self) -> dict[str, int]:
        """Return the numbers of tokens as OpenAI's protocol names them."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.tokens,
            "total_tokens": self.prompt_tokens + self.tokens,
        }


@dataclass
class Answerer:
    """Answers prompts with the models of a library."""

    models: Models
    engine: Engine
    tokenizer: PreTrainedTokenizerFast
    _choosing: SideThreads = field(default_factory=SideThreads)

    async def answer(
        self,
        model: str,
        prompt: Prompt,
        most: int | None,
        stops: Sequence[str],
        sampling: Sampling,
    ) -> Answer:
        """Return the answer to a prompt, or to the messages of a conversation.

        Messages go through the chat template if the experts were trained with it, or for the base alone if it has one.
        Without it, their texts follow each other, a line each. A route reads messages as each of its experts does, and
        the answer continues the form that the chosen expert reads. A text or tokens stay as they are.
        """
        model_named, readings = await asyncio.to_thread(read_prompt, self.models, self.tokenizer, model, prompt)
        longest = max(len(reading.ids) for reading in readings.by_form.values())
        # A prompt that is too long in any form is refused before a router reads it.
        answer_room(self.engine.reader, longest, 1)
        if isinstance(model_named, Route):
            choice, reading = await self._choosing.call(model_named.choose, self.engine.reader, readings)
        else:
            choice = model_named
            reading = readings.by_form[readings.base]
        ids = reading.ids
        free = max(self.engine.cache_tokens - len(ids), 1)
        room = answer_room(self.engine.reader, len(ids), most or min(MOST_TOKENS, free))
        await asyncio.to_thread(self.engine.check, choice.members, len(ids), room)
        tokens = self.engine.answer(ids, choice.experts, reading.ends, room, sampling)
        answer = Answer(choice, len(ids))
        is_conversation = isinstance(prompt, list) and not isinstance(prompt[0], int)
        answer.parts = self._parts(answer, tokens, stops, reading.ends, [] if is_conversation else ids[-16:])
        return answer

    async def _parts(
        self,
        answer: Answer,
        tokens: AsyncGenerator[Token, None],
        stops: Sequence[str],
        ends: Sequence[int],
        before: list[int],
    ) -> Parts:
        """Yield the parts of an answer; a stop text ends it, and is left out.

        It goes on with the text of the tokens `before`; without them, it has no white space at its start.
        """
        decoder = DecodeStream(skip_special_tokens=True)
        backend = self.tokenizer.backend_tokenizer
        text = ""
        held: list[Token] = []
        finish = "length"
        strip = not before
        while before and backend.decode(before).endswith("\ufffd"):  # they begin within a character of bytes
            before = before[1:]
        for token_before in before:  # many tokenizers leave out a space before the first token that they decode
            decoder.step(backend, token_before)
        kept_back = max(map(len, stops), default=1) - 1
        async with aclosing(tokens):
            async for token in tokens:
                answer.tokens += 1
                if token.id in ends:
                    finish = "stop"
                    break
                held.append(token)
                try:
                    text += decoder.step(backend, token.id) or ""
                except Exception:  # bytes that begin no character change how a run of bytes before them reads
                    decoder = DecodeStream(skip_special_tokens=True)
                    decoder.step(backend, token.id)
                    text += "\ufffd" + (decoder.step(backend, token.id) or "")
                text = text.lstrip() if strip else text
                strip = strip and not text
                stop_places = [text.index(stop) for stop in stops if stop in text]
                if stop_places:
                    text = text[: min(stop_places)]
                    finish = "stop"
                    break
                if len(text) > kept_back:
                    yield AnswerPart(text[: len(text) - kept_back], held)
                    text = text[len(text) - kept_back :]
                    held = []
        yield AnswerPart(text, held, finish)


def read_prompt(
    models: Models, tokenizer: PreTrainedTokenizerFast, model: str, prompt: Prompt
) -> tuple[ChosenExperts | Route, PromptReadings]:
    """Return what a model's name means, and the prompt in the forms in which its experts read it."""
    model_named = models.find(model)
    if isinstance(prompt, str):
        reading = encoded(tokenizer, prompt, False)
    elif isinstance(prompt[0], int):
        ids = cast(list[int], prompt)
        if not all(0 <= token < len(tokenizer) for token in ids):
            raise ValueError(f"the prompt has tokens outside of the vocabulary of {len(tokenizer)}")
        reading = PromptReading(ids, ends_of_answers(tokenizer, False), False)
    else:
        messages = cast(list[dict[str, str]], prompt)
        text = "\n".join(message["content"] for message in messages)
        if isinstance(model_named, Route):
            return model_named, read_as_each(tokenizer, text, messages, model_named.members)
        is_chat = reads_chat(tokenizer, model_named.members)
        reading = encoded(tokenizer, messages if is_chat else text, is_chat)
    form = reading.is_chat
    forms_of_members = [form for _ in model_named.members]
    return model_named, PromptReadings({form: reading}, forms_of_members, form)
