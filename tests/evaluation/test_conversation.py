"""A conversation answers as `generate` does, by the experts in use, and remembers what a chat template can show."""

from pathlib import Path

import pytest
from conftest import build_tokenizer
from testbed.served import make_library

from modular_experts import Base, Library, generate
from modular_experts.evaluation.streaming import Answering, Conversation

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"


@pytest.fixture
def chat_base(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    Base.open(tiny_llama_dir).load().save_pretrained(tmp_path / "chat")
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"


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
