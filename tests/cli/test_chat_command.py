"""`chat` reads prompts and commands line by line, and `generate --system` shows a system message to the template."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
from conftest import build_tokenizer
from testbed.served import make_library

from modular_experts import Base, generate
from modular_experts.library.opening import ADAPTER_FILE
from modular_experts.merging.route import route
from modular_experts.routing import Constant

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"


@pytest.fixture
def library(tiny_llama_dir, tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    make_library(tiny_llama_dir, tmp_path / "library")
    return "library"


def test_lines_are_prompts_and_commands_say_who_answers(run, library, tiny_llama_dir, monkeypatch) -> None:
    lines = ["the word", "/expert lora", "the word", "/expert lra", "", "/expert entries lora", "the word", "/new"]
    lines += ["/auto", "/help", "/go", "/expert", "the word", "/exit", "no"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    code, out, err = run("chat", library, "--max_new_tokens", "7")
    groups = ([], ["library/lora"], ["library/entries", "library/lora"])
    base, lora, both = (generate(tiny_llama_dir, "the word", experts, 7) for experts in groups)
    answers, _, told = out.partition("/expert NAME")
    assert (code, answers.split("\n")[:3]) == (0, [base, lora, both])
    assert told.splitlines()[-2:] == ["experts: answers, dense, entries, few_answers, int4, lora, tiles", base]
    assert err.splitlines() == [
        "there is no expert 'lra'; did you mean lora?",
        "/auto needs one route in the library, which has none; `route` makes one",
        "there is no command /go; /help shows those that there are",
    ]


def test_a_broken_adapter_ends_no_chat_and_auto_opens_none(run, library, tiny_llama_dir, monkeypatch, caplog):
    broken = Path(library, "a-broken")
    broken.mkdir()
    (broken / ADAPTER_FILE).write_text(json.dumps({"peft_type": "PROMPT_TUNING", "base_model_name_or_path": "x"}))
    expected = generate(tiny_llama_dir, "the word", ["library/lora"], 3)
    for base, skipped in (((), 1), (("--base", tiny_llama_dir), 0)):
        caplog.clear()
        monkeypatch.setattr(sys, "stdin", io.StringIO("/auto\n/expert lora\nthe word\n/expert a-broken"))
        code, out, err = run("chat", library, *base, "--max_new_tokens", "3")
        assert (code, out.strip()) == (0, expected)
        assert caplog.text.count("a-broken is skipped") == skipped
        assert re.search(r"which has none; `route` makes one\n.*a-broken.*\n", err)


def test_one_of_several_routes_answers_by_its_name(run, library, monkeypatch) -> None:
    for name in ("one", "two"):
        route([f"{library}/lora", f"{library}/entries"], f"{library}/{name}", Constant())
    monkeypatch.setattr(sys, "stdin", io.StringIO("/auto\n/expert two\nthe word"))
    code, out, err = run("chat", library, "--max_new_tokens", "3")
    assert err.startswith("/auto needs one route in the library, which has one, two; take one: /expert one\n")
    assert (code, bool(out.strip())) == (0, True)


def test_nobody_to_talk_with_is_one_sentence(run) -> None:
    assert run("chat") == (2, "", "error: give a library that holds experts, or --base DIR\n")
    assert "temperature=-1.0 at least 0" in run("chat", "--base", "DIR", "--temperature", "-1")[2]


def test_generate_takes_a_system_message(run, tiny_llama_dir, tmp_path, monkeypatch) -> None:
    Base.open(tiny_llama_dir).load().save_pretrained(tmp_path / "chat")
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "chat")
    words = ["generate", "--base", tmp_path / "chat", "--max_new_tokens", "7", "the word", "--system", "be brief"]
    expected = generate(tmp_path / "chat", "[system]be brief[user]the word[assistant]", max_new_tokens=7)
    assert run(*words)[:2] == (0, f"{expected}\n")
    assert run(*words, "--chat_template", "false")[2].startswith("error: --system goes through the chat template")


def test_the_only_route_of_a_library_answers_first(run, library, tiny_llama_dir, monkeypatch) -> None:
    route([f"{library}/lora", f"{library}/entries"], f"{library}/chosen", Constant())
    expected = generate(None, "the word", "library/chosen", 5)
    alone = generate(tiny_llama_dir, "the word", [], 5)
    for words, answer in (((), expected), (("--expert", "auto"), expected), (("--expert", "base"), alone)):
        monkeypatch.setattr(sys, "stdin", io.StringIO("the word"))
        code, out, _ = run("chat", library, *words, "--max_new_tokens", "5")
        assert (code, out.partition("  [")[0].strip()) == (0, answer)
    assert run("generate", "--experts", library, "the word", "--max_new_tokens", "5")[:2] == (0, f"{expected}\n")


def test_generate_names_the_experts_of_a_library_without_one_route(run, library) -> None:
    code, _, err = run("generate", "--experts", library, "the word")
    assert (code, err) == (
        2,
        "error: library is a library that has no route; name who answers: --experts library/answers\n",
    )
