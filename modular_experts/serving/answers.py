"""Turn requests into answers: tokenise the prompt, choose who answers, and decode the tokens as they come."""

import asyncio
from collections.abc import AsyncIterator, Sequence
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


class Piece(NamedTuple):
    """A part of an answer: its text, its tokens, and at the end why it ends (`stop` or `length`)."""

    text: str
    tokens: Sequence[Token] = ()
    finish: str | None = None


@dataclass
class Answer:
    """An answer that is about to be written: close its `pieces` to end it; `tokens` counts those that are written."""

    choice: ChosenExperts
    prompt_tokens: int
    pieces: AsyncIterator[Piece] = field(init=False)
    tokens: int = 0

    @property
    def usage(self) -> dict[str, int]:
        """Return the numbers of tokens as OpenAI's protocol names them."""
        read, written = self.prompt_tokens, self.tokens
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


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
        model_named, readings = await asyncio.to_thread(self.read, model, prompt)
        longest = max(len(reading.ids) for reading in readings.by_form.values())
        # A prompt that is too long in any form is refused before a router reads it.
        answer_room(self.engine.reader, longest, 1)
        if isinstance(model_named, Route):
            choice, reading = await self._choosing.call(model_named.choose, self.engine.reader, readings)
        else:
            choice, reading = model_named, readings.by_form[readings.base]
        ids, ends = reading.ids, reading.ends
        free = max(self.engine.cache_tokens - len(ids), 1)
        room = answer_room(self.engine.reader, len(ids), most or min(MOST_TOKENS, free))
        await asyncio.to_thread(self.engine.check, choice.members, len(ids), room)
        tokens = self.engine.answer(ids, choice.experts, ends, room, sampling)
        answer = Answer(choice, len(ids))
        is_conversation = isinstance(prompt, list) and not isinstance(prompt[0], int)
        answer.pieces = self._pieces(answer, tokens, stops, ends, [] if is_conversation else ids[-16:])
        return answer

    def read(self, model: str, prompt: Prompt) -> tuple[ChosenExperts | Route, PromptReadings]:
        """Return what a model's name means, and the prompt in the forms in which its experts read it."""
        found = self.models.find(model)
        if isinstance(prompt, str):
            reading = encoded(self.tokenizer, prompt, False)
        elif isinstance(prompt[0], int):
            ids = cast(list[int], prompt)
            if not all(0 <= token < len(self.tokenizer) for token in ids):
                raise ValueError(f"the prompt has tokens outside of the vocabulary of {len(self.tokenizer)}")
            reading = PromptReading(ids, ends_of_answers(self.tokenizer, False), False)
        else:
            messages = cast(list[dict[str, str]], prompt)
            text = "\n".join(message["content"] for message in messages)
            if isinstance(found, Route):
                return found, read_as_each(self.tokenizer, text, messages, found.members)
            is_chat = reads_chat(self.tokenizer, found.members)
            reading = encoded(self.tokenizer, messages if is_chat else text, is_chat)
        form = reading.is_chat
        return found, PromptReadings({form: reading}, [form] * len(found.members), form)

    async def _pieces(
        self, answer: Answer, tokens: AsyncIterator[Token], stops: Sequence[str], ends: Sequence[int], before: list[int]
    ) -> AsyncIterator[Piece]:
        """Yield the parts of an answer; a stop text ends it, and is left out.

        It goes on with the text of the tokens `before`; without them, it has no white space at its start.
        """
        decoder, backend = DecodeStream(skip_special_tokens=True), self.tokenizer.backend_tokenizer
        text, held, finish, strip = "", list[Token](), "length", not before
        while before and backend.decode(before).endswith("\ufffd"):  # they begin within a character of bytes
            before = before[1:]
        for token_before in before:  # many tokenizers leave out a space before the first token that they decode
            decoder.step(backend, token_before)
        kept_back = max(map(len, stops), default=1) - 1
        async with aclosing(tokens) as each:  # type: ignore[type-var]
            async for token in each:
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
                if found := [place for stop in stops if (place := text.find(stop)) >= 0]:
                    text, finish = text[: min(found)], "stop"
                    break
                if len(text) > kept_back:
                    yield Piece(text[: len(text) - kept_back], held)
                    text, held = text[len(text) - kept_back :], []
        yield Piece(text, held, finish)
