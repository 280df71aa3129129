"""Good records become rows; every bad one becomes its sentence."""

import json

import pytest

from modular_experts.data.rows import RowReader
from modular_experts.data.sources import Record


def read(values: object, **reader: object) -> object:
    """Return the row, or the sentence, of one record."""
    rows, problems = RowReader(**reader).read([Record("f.jsonl:7", values)])  # type: ignore[arg-type]
    return rows[0] if rows else problems[0]


def test_a_row_has_input_target_split_and_choices() -> None:
    row = read({"input": "a", "target": "b", "split": "dev", "choices": ["b", "c"], "more": 3})
    assert (row.input, row.target, row.split) == ("a", "b", "validation")
    assert (row.choices, row.where) == (("b", "c"), "f.jsonl:7")


def test_columns_and_template_make_the_input() -> None:
    values, columns = {"question": "is it?", "passage": "it {is}", "answer": "yes"}, {"target": "answer"}
    row = read(values, columns=columns | {"input": "question"}, template="{passage}\n{question} {input}")
    assert row.input == "it {is}\nis it? is it?"
    assert row.target == "yes"


def test_choices_of_the_task_stand_in_and_a_cell_may_hold_a_list() -> None:
    assert read({"input": "a", "target": "b"}, choices=["b", "c"]).choices == ("b", "c")
    assert read({"input": "a", "target": "b", "choices": '["b", "x"]'}, choices=["b", "c"]).choices == ("b", "x")
    assert read({"input": "a", "target": "b", "choices": None}).choices == ()
    assert read({"input": "a", "target": "1", "choices": "[0, 1, 1.50]"}).choices == ("0", "1", "1.50")


BAD = {
    "missing key": ({"input": "a", "taget": "b"}, "the row has no 'target', only 'input', 'taget'; is 'taget' meant?"),
    "wrong type": ({"input": "a", "target": 5}, "'target' must be text, not 5"),
    "blank input": ({"input": " \n", "target": "b"}, "'input' is empty"),
    "no object": (["a", "b"], "a row is an object with 'input' and 'target', not ['a', 'b']"),
    "split": ({"input": "a", "target": "b", "split": "tset"}, "'split' is 'tset', not one of train, validation, test"),
    "one choice": ({"input": "a", "target": "b", "choices": ["b"]}, "'choices' needs two or more different texts"),
    "target no choice": ({"input": "a", "target": "bb", "choices": ["b", "c"]}, "target 'bb' is not among its choices"),
    "surrogate": ({"input": "a\ud800", "target": "b"}, "'input' holds a lone surrogate"),
}


TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
BAD_TALKS = {
    "no list": ("a", "'messages' must be a list of messages, not 'a'"),
    "no answer": (TALK[:1], "the conversation ends with a message of role 'user'; to learn or to score, it must end"),
    "no question": (TALK[1:], "the conversation starts with the assistant; a message of the user comes before"),
}


@pytest.mark.parametrize("case", [*BAD, *BAD_TALKS])
def test_each_bad_row_or_conversation_gets_its_sentence(case: str) -> None:
    values, sentence = BAD[case] if case in BAD else BAD_TALKS[case]
    problem = read(values) if case in BAD else read({"messages": values}, columns={"messages": "messages"})
    assert isinstance(problem, str)
    assert problem.startswith(f"f.jsonl:7: {sentence}")
    assert "\n" not in problem


def test_a_conversation_has_its_last_answer_as_the_target_and_a_cell_may_hold_it() -> None:
    row = read({"m": json.dumps([*TALK, *TALK]), "split": "test"}, columns={"messages": "m"})
    assert (row.input, row.target, row.split) == ("user: a\nassistant: b\nuser: a", "b", "test")
    assert row.messages == (*TALK, *TALK)
    call = {"role": "assistant", "content": "I look.", "tool_calls": [{"function": {"name": "get"}}]}
    row = read({"messages": [TALK[0], call, *TALK, TALK[1] | {"tool_calls": None}]}, columns={"messages": "messages"})
    assert row.messages == (TALK[0], call, *TALK, TALK[1])
    call["tool_calls"][0]["function"]["arguments"] = {"day": 3}
    row = read({"messages": json.dumps([TALK[0], call])}, columns={"messages": "messages"})
    assert row.messages == (TALK[0], call)


def test_a_template_that_the_row_does_not_fill() -> None:
    misspelt = read({"question": "a", "target": "b"}, template="{qeustion}")
    assert "the template has {qeustion}, but the row has no 'qeustion'" in misspelt
    assert "is 'question' meant?" in misspelt
    assert "which is null here" in read({"question": None, "target": "b"}, template="{question}")
    assert "'input' is empty" in read({"question": "", "target": "b"}, template="{question}")
