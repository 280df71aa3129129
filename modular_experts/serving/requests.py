"""Define the requests of OpenAI's protocol that the server takes, and refuse what it would otherwise ignore."""

from collections.abc import Sequence
from secrets import randbits
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from transformers import PreTrainedTokenizerFast

from modular_experts.serving.engine import Sampling, Token

Json = dict[str, object]
"""An object of the protocol."""
Neutral = Annotated[float, Field(ge=0, le=0)]
"""A setting that the server lacks, and takes where it changes nothing."""
SEEDS = 2**63
ROLES = {"developer": "system"}
"""What templates call roles that OpenAI calls otherwise."""


class StrictFields(BaseModel):
    """Refuses fields that it does not have, and reads null as a field that is left out."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, fields: object) -> object:
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None}


class StreamOptions(StrictFields):
    """What a streamed answer tells at its end."""

    include_usage: bool = False
    include_obfuscation: bool = False


class AnyRequest(StrictFields):
    """What both kinds of requests have in common; the answer is the likeliest one if no temperature is given."""

    model: str = Field(min_length=1, max_length=4096)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int = Field(default_factory=lambda: randbits(63), ge=-SEEDS, lt=SEEDS)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] = 1
    presence_penalty: Neutral = 0.0
    frequency_penalty: Neutral = 0.0
    # These say nothing about the answer.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    safety_identifier: str | None = None

    @property
    def stops(self) -> list[str]:
        """The texts before which the answer ends."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @model_validator(mode="after")
    def _check_stops(self) -> "AnyRequest":
        if len(self.stops) > 16 or not all(0 < len(text) <= 256 for text in self.stops):
            raise ValueError("stop takes up to 16 texts of 1 to 256 characters")
        return self

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many of the likeliest tokens stand beside each token of the answer; None without probabilities."""
        raise NotImplementedError

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        return Sampling(self.temperature, self.top_p, self.seed % SEEDS, self.alternatives)


class Message(StrictFields):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str
    name: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _joined(cls, content: object) -> str:
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        texts = []
        for part in parts:
            text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
            if not isinstance(text, str):
                raise ValueError("this server reads text alone")
            texts.append(text)
        return "".join(texts)


class ChatRequest(AnyRequest):
    """A conversation to go on with."""

    prefix: ClassVar[str] = "chatcmpl"
    whole_object: ClassVar[str] = "chat.completion"
    part_object: ClassVar[str] = "chat.completion.chunk"
    messages: list[Message] = Field(min_length=1, max_length=1024)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def prompt(self) -> list[dict[str, str]]:
        return [
            {"role": ROLES.get(message.role, message.role), "content": message.content} for message in self.messages
        ]

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs or self.top_logprobs else None

    def in_field(self, text: str, is_part: bool) -> Json:
        """Return a text of the answer in its field."""
        return {"delta": {"content": text}} if is_part else {"message": {"role": "assistant", "content": text}}

    def logprobs_of(self, tokens: Sequence[Token], tokenizer: PreTrainedTokenizerFast) -> Json:
        """Return the probabilities of tokens in this protocol."""

        def entry(id: int, logprob: float | None) -> Json:
            text = _text(tokenizer, id)
            # A part of a character has no text, so its bytes are not known here.
            return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}

        content = []
        for token in tokens:
            likeliest = [entry(id, logprob) for id, logprob in token.likeliest]
            content.append(entry(token.id, token.logprob) | {"top_logprobs": likeliest})
        return {"content": content}


class CompletionRequest(AnyRequest):
    """A text to go on with: characters, or the ids of tokens."""

    prefix: ClassVar[str] = "cmpl"
    whole_object: ClassVar[str] = "text_completion"
    part_object: ClassVar[str] = "text_completion"
    prompt: str | list[int]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: Literal[False] = False
    best_of: Literal[1] = 1
    return_tokens_as_token_ids: bool = False
    """As in vLLM: tokens are named `token_id:5` and not by their text, which several may have."""

    @field_validator("prompt", mode="before")
    @classmethod
    def _only(cls, prompt: object) -> object:
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
            prompt = prompt[0]
        tokens = isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt)
        if not (tokens or isinstance(prompt, str)):
            raise ValueError("give one prompt in a request, as a text or as the ids of its tokens")
        return prompt

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    def in_field(self, text: str, is_part: bool) -> Json:
        """Return a text of the answer in its field."""
        return {"text": text}

    def logprobs_of(self, tokens: Sequence[Token], tokenizer: PreTrainedTokenizerFast) -> Json:
        """Return the probabilities of tokens in this protocol."""

        def name(id: int) -> str:
            return f"token_id:{id}" if self.return_tokens_as_token_ids else _text(tokenizer, id)

        likeliest = []
        for token in tokens:
            # Where several tokens have one text, the likeliest stays.
            likeliest.append({name(id): logprob for id, logprob in reversed(token.likeliest)})
        return {
            "tokens": [name(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": likeliest,
        }


def _text(tokenizer: PreTrainedTokenizerFast, id: int) -> str:
    """Return the text that a token has behind another one; alone, many tokenizers leave out its space."""
    return str(tokenizer.decode([id, id])[len(tokenizer.decode([id])) :])


def sentence(errors: Sequence[Any]) -> tuple[str, str | None]:
    """Return what is wrong with a request in one sentence, and the name of its field."""
    error = errors[0]
    place = ".".join(str(part) for part in error["loc"] if part != "body")[:200]
    field = place.split(".")[0] or None
    if error["type"] == "extra_forbidden":
        return f"this server does not know {place}; leave it out", field
    if error["type"] == "json_invalid":
        return "the request is no JSON", None
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{place}: {message[:1].lower()}{message[1:]}" if place else message, field
