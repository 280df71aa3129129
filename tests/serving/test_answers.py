"""Texts of answers whose characters are spread over several tokens."""

import asyncio

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modular_experts.serving.answers import Answer, Answerer
from modular_experts.serving.engine import Token
from modular_experts.serving.models import ChosenExperts
from modular_experts.serving.requests import ChatRequest, CompletionRequest, Message

TEXT = "\u00e9t\u00e9 \u6f22\u5b57 \U0001f642 e\u0301!"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of which each token is a byte."""
    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def pieces_of(tokenizer, tokens: list[int], *stops: str, before: str | list[int] = "") -> list:
    """Return the pieces of an answer that the model writes with these tokens behind a text."""

    async def written():
        for token in tokens:
            yield Token(token)

    async def all_of_them() -> list:
        answer, read = (
            Answer(ChosenExperts([]), 1),
            before if isinstance(before, list) else tokenizer(before)["input_ids"],
        )
        return [one async for one in Answerer(None, None, tokenizer)._parts(answer, written(), stops, [-1], read)]

    return asyncio.run(all_of_them())


def test_no_piece_ends_within_a_character(tokenizer) -> None:
    tokens = tokenizer(TEXT)["input_ids"]
    assert len(tokens) == len(TEXT.encode())
    pieces = pieces_of(tokenizer, tokens)
    assert "".join(piece.text for piece in pieces) == TEXT
    assert not any("\ufffd" in piece.text for piece in pieces)
    assert [token.id for piece in pieces for token in piece.tokens] == tokens
    assert pieces[-1].finish == "length"


@pytest.mark.parametrize("stop", ["\u5b57", "\U0001f642 e", "\u0301"])
def test_a_stop_text_of_several_tokens_ends_an_answer(tokenizer, stop: str) -> None:
    pieces = pieces_of(tokenizer, tokenizer(TEXT)["input_ids"], stop)
    assert "".join(piece.text for piece in pieces) == TEXT[: TEXT.index(stop)]
    assert pieces[-1].finish == "stop"


def test_an_answer_that_ends_within_a_character_leaves_it_out(tokenizer) -> None:
    tokens = tokenizer("so \u6f22")["input_ids"]
    pieces = pieces_of(tokenizer, tokens[:-1])
    assert "".join(piece.text for piece in pieces) == "so "
    assert sum(len(piece.tokens) for piece in pieces) == len(tokens) - 1


def test_parts_of_a_character_have_no_bytes_and_the_likeliest_of_one_text_is_told(tokenizer) -> None:
    first, second, _ = tokenizer("\u6f22")["input_ids"]
    tokens, part = [Token(first, -1.0, [(first, -1.0), (second, -2.0)])], {"token": "\ufffd", "bytes": None}
    assert CompletionRequest(model="a", prompt="b").logprobs_of(tokens, tokenizer)["top_logprobs"] == [{"\ufffd": -1.0}]
    (told,) = ChatRequest(model="a", messages=[Message(role="user", content="b")]).logprobs_of(tokens, tokenizer)[
        "content"
    ]
    assert told.pop("top_logprobs") == [part | {"logprob": -1.0}, part | {"logprob": -2.0}]
    assert told == part | {"logprob": -1.0}


def test_the_text_of_an_answer_joins_the_text_before_it() -> None:
    """The decoder of many a Llama takes the space from the start of a text."""
    backend = Tokenizer(models.WordLevel({"\u2581so": 0}, unk_token=""))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    told = CompletionRequest(model="a", prompt="so").logprobs_of([Token(0, -0.5, [(0, -0.5)])], tokenizer)
    assert told == {"tokens": [" so"], "token_logprobs": [-0.5], "top_logprobs": [{" so": -0.5}]}
    for before, text in (("so", " so so"), ("", "so so")):
        assert "".join(piece.text for piece in pieces_of(tokenizer, [0, 0], before=before)) == text


def test_tokens_before_an_answer_may_begin_within_a_character() -> None:
    """Many a Llama writes rare characters as bytes, and its decoder reads no byte of a run that begins within one."""
    text = "\u1270\u12ac"
    vocabulary = {"so": 0} | {f"<0x{byte:02X}>": number for number, byte in enumerate(text.encode(), 1)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=""))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    own = [vocabulary[f"<0x{byte:02X}>"] for byte in text.encode()]
    pieces = pieces_of(tokenizer, [0, 0], before=own[1:])
    assert "".join(piece.text for piece in pieces) == "soso"
    # Bytes that begin no character are one sign, as elsewhere.
    pieces = pieces_of(tokenizer, [0, *own[:4], 0], before=[0])
    assert "".join(piece.text for piece in pieces) == f"so{text[0]}\ufffdso"
