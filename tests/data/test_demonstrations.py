"""Demonstrations are other training rows of the task, by a seed, as many as fit; labels are targets that come again."""

import logging
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import CHARACTERS, build_tokenizer, write_rows
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from modular_experts import evaluate, generate
from modular_experts.base import Base
from modular_experts.data import TaskMixture
from modular_experts.data.chat import PromptReading
from modular_experts.data.demonstrations import drawn, labels_of
from modular_experts.data.row_tokenizer import RowTokenizer
from modular_experts.data.rows import Row
from modular_experts.evaluation.streaming import _behind_demonstrations

EOS = 1
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TRAINING = [Row(f"in {number}", f"out {number}", "train") for number in range(10)]


def ids(text: str) -> list[int]:
    return [3 + CHARACTERS.index(character) for character in text]


def chat_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def rows_of(*splits: tuple[str, int], word: str = "in") -> list[dict[str, str]]:
    return [
        {"input": f"{word} {split} {number}", "target": f"t{number % 3}", "split": split}
        for split, count in splits
        for number in range(count)
    ]


def test_a_draw_depends_on_the_seed_and_the_row_alone() -> None:
    rows = [Row(f"ask {number}", "x") for number in range(200)]
    one = drawn(rows, TRAINING, 3, 0)
    assert one == drawn(rows, TRAINING, 3, 0)
    assert one[::-1] == drawn(rows[::-1], TRAINING, 3, 0)
    assert one != drawn(rows, TRAINING, 3, 1)
    assert all(len({row.input for row in shown}) == 3 for shown in one)
    # Each of ten rows is expected 60 times in 600 draws, in each of three places 20 times.
    counts = Counter(row.input for shown in one for row in shown)
    assert min(counts.values()) > 35
    assert max(counts.values()) < 85
    assert len({shown[0].input for shown in one}) == 10


def test_no_row_is_shown_its_own_input_and_all_others_where_they_are_few() -> None:
    training = [*TRAINING, Row("in 3", "another answer", "train")]
    shown = drawn(TRAINING, training, 20, 0)
    for row, own in zip(TRAINING, shown, strict=True):
        assert sorted(other.input for other in own) == sorted(o.input for o in training if o.input != row.input)
    for own in drawn([TRAINING[3]] * 2, training, 9, 0):
        assert len(own) == 9


def test_demonstrations_are_rows_with_their_ends_before_the_prompt() -> None:
    shown = [Row("ab", "c", "train"), Row("d ", "e", "train")]
    (example,), cut, problems = RowTokenizer(build_tokenizer())(
        "t", [Row("ask", "f", choices=("f", "g"))], False, [shown]
    )
    before = [*ids("ab c"), EOS, *ids("d e"), EOS, *ids("ask")]
    assert example.tokens.ids.tolist() == [*before, *ids(" f"), EOS]
    assert example.tokens.prompt == len(before)
    assert [choice.ids.tolist() for choice in example.choices] == [[*before, *ids(f" {c}"), EOS] for c in "fg"]
    assert (example.input, example.shots, cut, problems) == ("ask", 2, 0, [])


def test_a_long_row_has_the_demonstrations_that_fit() -> None:
    shown = [Row("ab", "c"), Row("de", "f")]
    # A demonstration takes 5 tokens, and the row 6.
    for longest, count in ((16, 2), (15, 1), (11, 1), (10, 0), (6, 0)):
        (example,), cut, _ = RowTokenizer(build_tokenizer(), longest)("t", [Row("ask", "g")], False, [shown])
        assert example.shots == count
        assert example.tokens.ids.tolist()[-6:] == [*ids("ask g"), EOS]
        assert len(example.tokens.ids) == 6 + 5 * count
        assert cut == 0
    # The ones nearest to the row stay.
    (example,), _, _ = RowTokenizer(build_tokenizer(), 11)("t", [Row("ask", "g")], False, [shown])
    assert example.tokens.ids.tolist()[:5] == [*ids("de f"), EOS]


def test_with_a_chat_template_they_are_turns() -> None:
    tokenizer = chat_tokenizer()
    shown = [Row("ab", "c"), Row("de", "f")]
    turns = [
        {"role": role, "content": text}
        for pair in (("ab", "c"), ("de", "f"))
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    (plain,), _, _ = RowTokenizer(tokenizer, chat_template=True)("t", [Row("ask", "g")], False, [shown])
    text = tokenizer.apply_chat_template(
        [*turns, {"role": "user", "content": "ask"}], tokenize=False, add_generation_prompt=True
    )
    assert plain.tokens.ids[: plain.tokens.prompt].tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    talk = ({"role": "user", "content": "ask"}, {"role": "assistant", "content": "g"})
    (example,), _, _ = RowTokenizer(tokenizer)("t", [Row("ask", "g", messages=talk)], False, [shown])
    whole = tokenizer.apply_chat_template([*turns, *talk], tokenize=False)
    expected = tokenizer(whole, add_special_tokens=False)["input_ids"]
    *read, end = example.tokens.ids.tolist()
    assert (expected[: len(read)], end) == (read, EOS)


def test_all_rows_of_a_mixture_have_them_and_the_log_tells(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    held_in = write_rows(tmp_path / "a.jsonl", rows_of(("train", 9), ("validation", 3), ("test", 3)))
    held_out = write_rows(tmp_path / "b.jsonl", rows_of(("train", 2), ("test", 2), word="other"))
    data = TaskMixture(
        [str(held_in), {"path": str(held_out), "role": "held_out"}],
        tokenizer=build_tokenizer(),
        shots=4,
        max_length=100,
    )
    with caplog.at_level(logging.INFO):
        shots = {name: {row.shots for row in rows} for name, rows in data.examples("test").items()}
    assert shots == {"a": {4}, "b": {2}}
    assert "a: 4 demonstrations stand before each of 3 test rows" in caplog.text
    assert "b: 2 of 2 test rows have fewer than 4 demonstrations, down to 2: " in caplog.text
    assert {row.shots for row in data.examples("train")["a"]} == {4}
    assert data.reading_of(["a"])["shots"] == 4
    plain = TaskMixture([str(held_in)], tokenizer=build_tokenizer())
    assert "shots" not in plain.reading_of(["a"])
    narrow = TaskMixture([str(held_in)], tokenizer=build_tokenizer(), shots=4, max_length=45)
    counts = [row.shots for row in narrow.examples("test")["a"]]
    assert max(counts) < 4


def test_a_comparison_tells_of_them_in_its_results_and_on_its_page(tiny_llama_dir: Path, tmp_path: Path) -> None:
    rows = rows_of(("train", 4), ("test", 2))
    data = TaskMixture(str(write_rows(tmp_path / "a.jsonl", rows)), shots=3, shots_seed=5)
    found = evaluate(tiny_llama_dir, [], data, 1, out=tmp_path / "out")
    assert (found.facts["shots"], found.facts["shots_seed"]) == (3, 5)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Up to 3 demonstrations of its task stand before each row." in page


def test_bad_demonstrations_get_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shots=-1 must be 0 or more"):
        TaskMixture("a.jsonl", shots=-1)
    unseen = write_rows(tmp_path / "c.jsonl", [{"input": "a", "target": "b"}])
    data = TaskMixture({"path": str(unseen), "role": "held_out"}, tokenizer=build_tokenizer(), shots=2)
    with pytest.raises(ValueError, match=r"'c' has no training rows for shots=2 .* the split 'train'"):
        data.examples("test")
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    talks = write_rows(tmp_path / "d.jsonl", [{"messages": talk, "split": "train"}] * 2)
    data = TaskMixture(str(talks), tokenizer=chat_tokenizer(), shots=2)
    with pytest.raises(ValueError, match=r"d: all turns of a conversation are learned.*shots=2"):
        data.examples("train")


def test_labels_are_targets_that_come_again() -> None:
    assert labels_of([Row("a", "no"), Row("b", "yes")] * 3) == ("no", "yes")
    assert labels_of([Row("a", "no"), Row("b", "yes")] * 2) == ()
    assert labels_of([Row("a", "no")] * 9) == ()
    assert labels_of([Row("a", str(number % 101)) for number in range(1000)]) == ()


def test_rows_without_choices_get_the_labels_in_the_test_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*rows_of(("train", 9), ("test", 2)), {"input": "q", "target": "unseen", "split": "test"}]
    file = write_rows(tmp_path / "a.jsonl", rows)
    own = [{**row, "choices": ["t0", "t1", "t2", "t3"]} for row in rows_of(("train", 9), ("test", 3))]
    chosen = write_rows(tmp_path / "b.jsonl", own)
    free = [{"input": f"x{n}", "target": f"y{n}", "split": "train" if n else "test"} for n in range(9)]
    other = write_rows(tmp_path / "c.jsonl", free)
    data = TaskMixture([str(file), str(chosen), str(other)], tokenizer=build_tokenizer(), label_choices=True)
    with caplog.at_level(logging.INFO):
        test = data.examples("test")
    assert [(len(row.choices), row.correct) for row in test["a"]] == [(3, 0), (3, 1), (3, 3)]
    assert [len(row.choices) for row in test["b"]] == [4, 4, 4]
    assert [row.choices for row in test["c"]] == [()]
    assert "c: the targets of its training rows do not come again, so they are not compared as labels" in caplog.text
    assert not any(row.choices for row in data.examples("train")["a"])
    batch = next(iter(data.test_dataloader()))
    # No label is right for a target that no training row has.
    assert batch["choices"]["correct"].sum() == len(test["a"]) - 1 + len(test["b"])


@pytest.mark.parametrize("chat", [False, True])
def test_a_prompt_of_no_row_has_the_demonstrations_that_a_row_would_have(tmp_path: Path, chat: bool) -> None:
    rows = rows_of(("train", 9), ("test", 1))
    data = TaskMixture(
        str(write_rows(tmp_path / "a.jsonl", rows)), tokenizer=chat_tokenizer(), shots=3, chat_template=chat
    )
    (row,) = data.examples("test")["a"]
    assert row.shots == 3
    assert data.prompt_behind_demonstrations(row.input) == row.tokens.ids[: row.tokens.prompt].tolist()
    data.shots = 0
    with pytest.raises(ValueError, match="tasks=a and shots=0: demonstrations before a prompt come from one task"):
        data.prompt_behind_demonstrations("x")


def test_a_prompt_has_demonstrations_that_are_conversations(tmp_path: Path) -> None:
    talks = [
        [{"role": "user", "content": f"in {number}"}, {"role": "assistant", "content": "b"}] for number in range(3)
    ]
    place = write_rows(tmp_path / "d.jsonl", [{"messages": talk, "split": "train"} for talk in talks])
    tokenizer = chat_tokenizer()
    data = TaskMixture(str(place), tokenizer=tokenizer, shots=3)
    text = tokenizer.decode(data.prompt_behind_demonstrations("ask"))
    assert text.endswith("assistant: ")
    assert text.count("user: ask") == 1
    assert text.count("assistant: b") == 3


def test_generate_shows_demonstrations_to_a_model(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """The answer is that to the prompt which the row tokenizer makes."""
    place = str(write_rows(tmp_path / "a.jsonl", rows_of(("train", 9))))
    data = TaskMixture(place, shots=3)
    answer = generate(tiny_llama_dir, "ask", max_new_tokens=8, data=data)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    prompt = torch.tensor([data.prompt_behind_demonstrations("ask")])
    made = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
    tokenizer = data.row_tokenizer().tokenizer
    assert answer == tokenizer.decode(made[0, prompt.shape[1] :], skip_special_tokens=True).strip()
    asked = [{"role": "user", "content": "a"}]
    with pytest.raises(ValueError, match="leave the system message out"):
        _behind_demonstrations(PromptReading([], [], True), asked, data, Base.open(tiny_llama_dir))
