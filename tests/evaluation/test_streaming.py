"""A prompt gets the answer that greedy decoding by hand gives, piece by piece, and a conversation answers likewise."""

from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import build_tokenizer
from test_generation import greedily
from testbed.served import make_library

from modular_experts import Base, Dense, Library, generate
from modular_experts.evaluation.streaming import Answering, Conversation

PROMPT = "the word"


def by_hand(base: Path, moved: dict[str, torch.Tensor], prompt: str, count: int) -> str:
    model = Base.open(base).load()
    for name, values in moved.items():
        model.get_parameter(name).data += values
    return greedily(model, prompt, count)


def test_an_answer_is_what_the_likeliest_tokens_spell_with_the_expert_added(tiny_llama_dir: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    delta = torch.randn(32, 48, generator=torch.Generator().manual_seed(0))
    for moved in ({}, {name: delta}):
        pieces: list[str] = []
        experts = [{key: Dense(value) for key, value in moved.items()}]
        answer = generate(tiny_llama_dir, PROMPT, experts, max_new_tokens=9, write=pieces.append)
        assert answer == by_hand(tiny_llama_dir, moved, PROMPT, 9) == "".join(pieces).strip()
    assert by_hand(tiny_llama_dir, {}, PROMPT, 9) != by_hand(tiny_llama_dir, {name: delta}, PROMPT, 9)


def test_samples_depend_on_the_seed_alone(tiny_llama_dir: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    drawn = partial(generate, tiny_llama_dir, PROMPT, max_new_tokens=9, temperature=1.0)
    one, two, other = (drawn(seed=seed) for seed in (1, 1, 2))
    assert one == two != other
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def chat_base(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    Base.open(tiny_llama_dir).load().save_pretrained(tmp_path / "chat")
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    tokenizer.save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"


def test_a_chat_prompt_goes_through_the_template_and_what_is_no_prompt_is_refused(tiny_llama_dir, chat_base) -> None:
    with pytest.raises(ValueError, match="rows of messages need a chat template"):
        generate(tiny_llama_dir, PROMPT, chat_template=True)
    full = "has 256 tokens, and the base's context has room for 256"
    for words, sentence in ((" ", "the prompt is empty"), ("a" * 256, full)):
        with pytest.raises(ValueError, match=sentence):
            generate(tiny_llama_dir, words, max_new_tokens=9)
    found = generate(chat_base, PROMPT, max_new_tokens=9, chat_template=True)
    assert found == by_hand(tiny_llama_dir, {}, f"[user]{PROMPT}[assistant]", 9)


def test_each_expert_answers_prompts_alone_where_no_template_is(tiny_llama_dir, tmp_path) -> None:
    library = make_library(tiny_llama_dir, tmp_path / "library")
    talk = Conversation(Base.open(tiny_llama_dir), Library(library), Answering(max_new_tokens=9))
    for names in ((), ("lora",), ("entries", "lora"), ()):
        talk.experts.use(*names)
        pieces: list[str] = []
        answer = talk.ask("the word", pieces.append)
        assert answer == generate(tiny_llama_dir, "the word", [library / name for name in names], 9)
        assert "".join(pieces).strip() == answer


def test_a_template_shows_the_system_message_and_what_was_said(chat_base) -> None:
    talk = Conversation(Base.open(chat_base), {}, Answering("be brief", 5))
    first = talk.ask("one")
    said = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "one"}]
    assert first == generate(chat_base, said, max_new_tokens=5)
    assert first == generate(chat_base, "[system]be brief[user]one[assistant]", max_new_tokens=5)

    def stop(piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.ask("never mind", stop)
    said += [{"role": "assistant", "content": first}]
    assert talk.messages == said
    assert talk.ask("two") == generate(chat_base, [*said, {"role": "user", "content": "two"}], max_new_tokens=5)
