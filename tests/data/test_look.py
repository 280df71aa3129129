"""A look shows what a fit learns of each row, how long rows are, and which rows repeat."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from modular_experts import TaskMixture, look
from modular_experts.__main__ import main


@pytest.fixture
def file(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    rows = [{"question": "a" * length, "answer": "b", "split": "train"} for length in (3, 3, 9, 4)]
    rows += [{"question": "aaa", "answer": answer, "split": "test"} for answer in "bbc"]
    rows[3]["question"] = "a\nbc"
    Path("q.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return "q.jsonl"


def test_tokens_that_are_learned_are_marked_and_lengths_are_counted_before_the_cut(tiny_llama_dir, file) -> None:
    (task,) = look(tiny_llama_dir, file, max_length=8).tasks
    # The middle, the 95th hundredth and the longest of 6, 6, 7, 12.
    assert task.splits == {
        "train": {"rows": 4, "median": 7, "p95": 12, "longest": 12, "cut": 1},
        "test": {"rows": 3, "median": 6, "p95": 6, "longest": 6, "cut": 0},
    }
    data = TaskMixture(file, str(tiny_llama_dir), max_length=8)
    data.setup("fit")
    first = data.train_dataloader().dataset.examples[0].tokens
    place, tokens = task.shown[0]
    assert place == "q.jsonl:1 (train)"
    assert [learned for _, learned in tokens] == (first.labels >= 0).tolist() == [False] * 3 + [True] * 3
    assert "".join(text for text, _ in tokens) == "aaa b" + data.tokenizer.eos_token
    assert task.facts[0] == "'question' is the input, 'answer' is the target, as the columns are called"
    assert task.facts[2:] == [
        "rows of at most max_length=8; a longer one loses its start",
        "longest: q.jsonl:3 (train) with 12, q.jsonl:4 (train) with 7, q.jsonl:1 (train) with 6",
        "1 of 4 train rows repeat an earlier one",
        "1 of 3 test rows repeat an earlier one",
        "2 of 3 test rows are also training rows",
    ]


@pytest.mark.parametrize(
    ("settings", "fact"),
    [
        ({"columns": {"input": "question", "target": "answer"}}, "the task names its columns"),
        ({"template": "{question}?", "columns": {"target": "answer"}}, "the task names its template"),
    ],
)
def test_the_reading_that_a_task_names_is_said(tiny_llama_dir, file, settings, fact) -> None:
    found = look(tiny_llama_dir, {"path": file, "role": "held_out", **settings})
    assert found.tasks[0].facts[0] == fact
    assert [*found.tasks[0].splits] == ["test"]
    with pytest.raises(ValueError, match="'q' is held out and has no test rows; give some rows the split 'test'"):
        look(tiny_llama_dir, {"path": file, "role": "held_out", "where": {"split": "train"}})


def test_the_command_prints_the_text_and_writes_a_page(tiny_llama_dir, file, capsys) -> None:
    words = ["look", "--base", str(tiny_llama_dir), "--tasks", file, "--page", "look.html"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "q.jsonl:2 (train)\na|a|a|[ ][b][" in out
    assert "q.jsonl:3 (train)\n" not in out
    assert ["train", "4", "7", "12", "12", "0"] in [line.split() for line in out.splitlines()]
    page = ElementTree.fromstring(Path("look.html").read_text().partition("\n")[2])
    learned = ["".join(one.itertext()) for one in page.iter("span") if one.get("class") == "learned"]
    assert learned[:2] == [" ", "b"]
    assert "2 of 3 test rows are also training rows" in [one.text for one in page.iter("li")]
    assert "The marked tokens are learned; in a task" in page.findtext(".//header/p")
    assert main(words) == 1
    assert "look.html exists already; choose another place, or replace it with" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    capsys.readouterr()
    assert main(["look", file, "--base", str(tiny_llama_dir)]) == 0
    assert f"{capsys.readouterr().out}\nthe page is look.html\n" == out
