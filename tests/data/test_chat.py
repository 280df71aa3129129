"""Conversations become the ids and labels that a hand would write, or are refused with a sentence."""

import json

import pytest
from conftest import CHARACTERS, build_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modular_experts.data.batch import IGNORED, Collator, prompts_of
from modular_experts.data.chat import encoded, warn_once
from modular_experts.data.row_tokenizer import RowTokenizer
from modular_experts.data.rows import Row, RowReader, content_hash
from modular_experts.data.sources import Record

# As SmolLM2 and Qwen2.5 have it, with a system message of their own if there is none.
CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Llama 3 has it.
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}<|begin|>{% endif %}"
    "<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# As older models have it: no special token ends a turn.
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|begin|>", "<|head|>", "<|/head|>", "<|eot|>"]


def chatty(template: str) -> PreTrainedTokenizerFast:
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = template
    return tokenizer


def ids(text: str) -> list[int]:
    """Token ids by hand: three special tokens, the characters, then the marks of the templates."""
    found, first = [], 3 + len(CHARACTERS)
    while text:
        mark = next((mark for mark in ["<eos>", *SPECIAL] if text.startswith(mark)), None)
        special = {"<eos>": 1} | {mark: first + number for number, mark in enumerate(SPECIAL)}
        found.append(3 + CHARACTERS.index(text[0]) if mark is None else special[mark])
        text = text[len(mark or "x") :]
    return found


def row(*turns: str, where: str = "") -> Row:
    """A conversation of `role: content` turns."""
    messages = [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]
    answered = messages[-1]["role"] == "assistant"
    return Row("in", messages[-1]["content"] if answered else None, where=where, messages=tuple(messages))


def learned(*pieces: str) -> tuple[list[int], list[int]]:
    """Ids and labels of pieces of text, of which every second one is learned."""
    found = [(ids(piece), number % 2 == 1) for number, piece in enumerate(pieces)]
    labels = [token if learns else IGNORED for tokens, learns in found for token in tokens]
    return [token for tokens, _ in found for token in tokens], labels


TALK = ["user: hi", "assistant: yo", "user: and", "assistant: so"]
YOU = ["system: You.", *TALK[:2]]
START, HI = "<|im_start|>system\nBe.<|im_end|>\n", "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
YOU3 = "<|head|>system<|/head|>\n\nYou.<|eot|>"
HI3 = "<|head|>user<|/head|>\n\nhi<|eot|><|head|>assistant<|/head|>\n\n"
CASES = {
    "chatml": (CHATML, TALK, [START + HI, "yo<|im_end|>", "\n" + HI.replace("hi", "and"), "so<|im_end|>"]),
    "chatml with a system message": (CHATML, YOU, [START.replace("Be", "You") + HI, "yo<|im_end|>"]),
    "llama 3": (LLAMA3, TALK, ["<|begin|>" + HI3, "yo<|eot|>", HI3.replace("hi", "and"), "so<|eot|>"]),
    "llama 3 with a system message": (LLAMA3, YOU, [f"<|begin|>{YOU3}{HI3}", "yo<|eot|>"]),
    "plain": (PLAIN, TALK, ["user: hi\nassistant: ", "yo\n", "user: and\nassistant: ", "so\n<eos>"]),
    "marked": (MARKED, TALK, ["[user]hi\n[assistant]", "yo<|im_end|>", "\n[user]and\n[assistant]", "so<|im_end|>"]),
}


@pytest.mark.parametrize("case", CASES)
def test_training_learns_each_turn_of_the_assistant_and_a_measurement_takes_the_last(case: str) -> None:
    template, turns, pieces = CASES[case]
    tokenizer = chatty(template)
    examples, cut, problems = RowTokenizer(tokenizer)("t", [row(*turns)], learn=True)
    assert (cut, problems) == (0, [])
    batch = Collator(pad_id=0, texts=False)(examples)
    expected, labels = learned(*pieces)
    assert batch["input_ids"].tolist() == [expected]
    assert batch["labels"].tolist() == [labels]
    examples, _, _ = RowTokenizer(tokenizer)("t", [row(*turns), row(*turns[:-1])])
    batch = Collator(pad_id=0)(examples)
    prompt = ids("".join(pieces[:-1]))
    assert [found.tolist() for found in prompts_of(batch)] == [prompt, prompt]
    assert batch["labels"][0].tolist() == [IGNORED] * len(prompt) + ids(pieces[-1])
    assert (batch["labels"][1] == IGNORED).all()
    assert batch["target"] == [turns[-1].partition(": ")[2], None]
    assert batch["end"] == [ids(pieces[-1])[-1]] * 2


def joining(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer in which a space belongs to the word behind it, as in GPT-2's."""
    vocabulary = ["<eos>", "<unk>", "<|im_end|>", "user", "assistant", "[user]", "[assistant]", ":", " ", " hi", " yes"]
    backend = Tokenizer(models.WordLevel({token: number for number, token in enumerate(vocabulary)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|\[\w+\]|."), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", [PLAIN, MARKED.replace("]", "] ")])
def test_a_token_that_begins_before_the_answer_is_one_of_the_answer(template: str) -> None:
    tokenizer = joining(template)
    (example,), _, _ = RowTokenizer(tokenizer)("t", [row("user: hi", "assistant: yes")], learn=True)
    answer = tokenizer.convert_ids_to_tokens(example.tokens.ids[example.tokens.prompt :])
    assert answer[0] == " yes"
    assert (
        example.tokens.labels.tolist()[example.tokens.prompt :] == example.tokens.ids[example.tokens.prompt :].tolist()
    )


@pytest.mark.parametrize("template", [PLAIN, MARKED.replace("]", "] ")])
@pytest.mark.parametrize("make", [joining, chatty])
def test_prompts_are_alike_in_training_in_rows_without_an_answer_and_in_generation(make, template: str) -> None:
    tokenizer = make(template)
    asked, answered = row("user: hi"), row("user: hi", "assistant: yes")
    learned, _, _ = RowTokenizer(tokenizer)("t", [answered], learn=True)
    predicted, _, _ = RowTokenizer(tokenizer)("t", [asked])
    texts, _, _ = RowTokenizer(tokenizer, chat_template=True)("t", [Row("hi", "yes")], learn=True)
    read = [example.tokens.ids[: example.tokens.prompt].tolist() for example in (*learned, *predicted, *texts)]
    assert read == [encoded(tokenizer, list(asked.messages), chat=True).ids] * 3
    first = [example.tokens.ids[example.tokens.prompt] for example in (*learned, *texts)]
    assert first[0] == first[1] == tokenizer.convert_tokens_to_ids(" yes" if make is joining else "y")


def test_the_template_gets_the_tools_of_a_row_in_training_and_in_prompts() -> None:
    tokenizer = chatty("{% if tools %}({% for one in tools %}{{ one.name }};{% endfor %}){% endif %}" + CHATML)
    tools, said = [{"name": "day"}, {"name": "night"}], list(row("user: hi", "assistant: yo").messages)
    reader = RowReader({"messages": "messages"}, targets=False)
    rows, problems = reader.read(
        Record("f:1", {"messages": messages, "tools": given})
        for given in (tools, json.dumps(tools), [], None)
        for messages in (said, said[:1])
    )
    assert not problems
    examples, _, _ = RowTokenizer(tokenizer)("t", rows)
    learned, _, _ = RowTokenizer(tokenizer)("t", rows[::2], learn=True)
    texts = [tokenizer.decode(one.tokens.ids[: one.tokens.prompt]) for one in (*examples, *learned)]
    assert (
        texts
        == [f"(day;night;){START}{HI}"] * 4 + [START + HI] * 4 + [f"(day;night;){START}{HI}"] * 2 + [START + HI] * 2
    )
    # A row without tools has the hash that it has in data without the column.
    plain, _ = reader.read([Record("f:1", {"messages": said})])
    assert content_hash(plain) == content_hash(rows[4:5]) == content_hash(rows[6:7])
    assert content_hash(rows[:1]) == content_hash(rows[2:3]) != content_hash(plain)
    for wrong in ("day", ["day"], {"name": "day"}):
        _, (problem,) = reader.read([Record("f:1", {"messages": said, "tools": wrong})])
        assert "f:1: 'tools' must be a list of JSON schemas of functions, not" in problem


def test_a_token_that_takes_the_white_space_behind_it_stays_in_the_prompt() -> None:
    # As in Phi-3's tokenizer.
    tokenizer = build_tokenizer()
    opening = AddedToken("<|assistant|>", special=True, rstrip=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", opening, "<|end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    (example,), _, _ = RowTokenizer(tokenizer)("t", [row("user: hi", "assistant:  yes")], learn=True)
    answer = tokenizer.convert_ids_to_tokens(example.tokens.ids[example.tokens.prompt :])
    assert answer == [*"yes", "<|end|>"]


def test_a_long_conversation_loses_its_oldest_turns_and_keeps_its_system_message() -> None:
    turns = ["system: S", *TALK, "user: x", "assistant: z"]
    head = "<|begin|><|head|>system<|/head|>\n\nS<|eot|>"
    tail = "<|head|>user<|/head|>\n\nx<|eot|><|head|>assistant<|/head|>\n\n"
    kept = [*ids(head + tail + "z"), ids("<|eot|>")[0]]
    examples, cut, _ = RowTokenizer(chatty(LLAMA3), max_length=len(kept) + 1)("t", [row(*turns)], learn=True)
    assert examples[0].tokens.ids.tolist() == kept
    assert cut == 1
    # With less room than the last turns take, tokens are lost on the left.
    examples, cut, _ = RowTokenizer(chatty(LLAMA3), max_length=9)("t", [row(*turns)], learn=True)
    assert examples[0].tokens.ids.tolist() == kept[-9:]
    assert examples[0].tokens.labels.tolist() == [IGNORED] * 7 + kept[-2:]
    _, _, problems = RowTokenizer(chatty(LLAMA3), max_length=3)("t", [row("user: a", "assistant: abc", where="f:1")])
    assert problems == ["f:1: the assistant's last turn fills max_length=3; raise it"]


@pytest.mark.parametrize("case", ["chatml", "plain", "marked"])
def test_a_conversation_that_fits_without_the_end_of_its_template_is_whole(case: str) -> None:
    template, turns, pieces = CASES[case]
    whole = ids("".join(pieces))
    examples, cut, problems = RowTokenizer(chatty(template), max_length=len(whole))("t", [row(*turns)], learn=True)
    assert (examples[0].tokens.ids.tolist(), cut, problems) == (whole, 0, [])


def test_a_row_of_texts_among_conversations_is_refused() -> None:
    rows = [Row("q", "a", where="f:1"), row(*TALK, where="f:2"), Row("q", "b", where="f:3")]
    told = "this row has texts, and f:2 is a conversation; write all rows of a task alike"
    assert RowTokenizer(chatty(CHATML))("t", rows)[2] == [f"f:1: {told}", f"f:3: {told}"]


def test_a_template_that_ends_turns_with_text_gets_a_sentence(caplog) -> None:
    warn_once.cache_clear()
    for template in (PLAIN, PLAIN.replace("\n", "###\n")):
        (example,), _, _ = RowTokenizer(chatty(template))("t", [row(*TALK[:2])])
        assert example.tokens.ids[-1] == 1
    (record,) = caplog.records
    assert record.getMessage().startswith("the chat template ends turns with plain text instead of a special token")


REFUSED = {
    "the chat template writes message 2 differently once others follow": (
        "{% for m in messages %}{% if loop.first or m.role != loop.previtem.role %}[{{ m.role }}]{% endif %}"
        "{{ m.content }}{% if loop.last %}.{% endif %}{% endfor %}"
    ),
    "the chat template refuses the conversation: two at most": (
        "{% if messages | length > 2 %}{{ raise_exception('two at most') }}{% endif %}{{ messages[0].content }}"
        "{% if messages | length > 1 %}{{ messages[1].content }}{% endif %}"
    ),
    "the chat template marks no turn of the assistant": (
        "{% for m in messages %}{{ m.content }}{% endfor %}"
        "{% if false %}{% generation %}x{% endgeneration %}{% endif %}"
    ),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_a_template_that_does_not_show_the_turns_is_refused(sentence: str) -> None:
    examples, _, problems = RowTokenizer(chatty(REFUSED[sentence]))("t", [row(*TALK, where="f:3")], learn=True)
    assert examples == []
    assert problems[0].startswith(f"f:3: {sentence}")
