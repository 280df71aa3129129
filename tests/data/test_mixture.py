"""The mixture reads, refuses, splits and serves; a plain Trainer needs to know nothing about it."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tokenizer, write_rows

from modular_experts.data import Task, TaskMixture

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*")  # Lightning 2.6.6 meets torch 2.13


def mixture(*tasks: Any, **options: Any) -> TaskMixture:
    return TaskMixture(list(tasks), **({"tokenizer": build_tokenizer()} | options))


@pytest.fixture
def three(task_files: dict[str, Path]) -> list[Task]:
    """Two held-in tasks and one held-out, each with 12 train, 6 validation and 6 test rows."""
    roles = {"upper": "held_in", "reverse": "held_in", "first": "held_out"}
    return [Task(name, path=str(path), role=roles[name]) for name, path in task_files.items()]  # type: ignore[arg-type]


def served(loader: Any) -> list[tuple[str, str]]:
    return [pair for batch in loader for pair in zip(batch["task"], batch["input"], strict=True)]


def test_held_out_tasks_are_tested_and_nothing_else(three: list[Task]) -> None:
    """Reading takes no number from the global generator."""
    data = mixture(*three)
    data.setup()
    before = torch.get_rng_state()
    train = Counter(task for batch in data.train_dataloader() for task in batch["task"])
    assert train == {"upper": 12, "reverse": 12}
    assert Counter(task for task, _ in served(data.val_dataloader())) == {"upper": 6, "reverse": 6}
    assert Counter(task for task, _ in served(data.test_dataloader())) == {"upper": 6, "reverse": 6, "first": 6}
    assert data.roles == {"upper": "held_in", "reverse": "held_in", "first": "held_out"}
    assert torch.equal(torch.get_rng_state(), before)


def test_prediction_keeps_the_order_of_tasks_and_files(three: list[Task]) -> None:
    data = mixture(*three)
    data.setup("test")
    path = three[0].path
    assert path is not None
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    wanted = [("upper", row["input"]) for row in rows if row["split"] == "test"]
    assert served(data.predict_dataloader())[:6] == wanted


def test_rows_without_a_split_are_divided_and_the_training_seed_does_not_matter(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"input": f"row {n}", "target": "x"} for n in range(40)])
    task = Task("a", path=str(path))

    def parts(seed: int) -> list[set[str]]:
        data = mixture(task, seed=seed)
        data.setup()
        return [{text for _, text in served(loader)} for loader in (data.val_dataloader(), data.test_dataloader())]

    assert [len(part) for part in parts(0)] == [4, 4]
    assert parts(0) == parts(1)


def test_bad_rows_of_all_tasks_are_reported_together_before_anything_runs(tmp_path: Path) -> None:
    good = {"input": "a", "target": "b"}
    one = write_rows(tmp_path / "one.jsonl", [good, {"input": "a"}, {"input": "a", "target": ""}])
    two = tmp_path / "two.jsonl"
    two.write_text('{"input": "a", "target": "b"}\n{"input": \n')
    data = mixture(Task("one", path=str(one)), Task("two", path=str(two), role="held_out"))
    with pytest.raises(ValueError, match="3 bad rows in the task data, so nothing was run") as error:
        data.setup("fit")
    lines = str(error.value).splitlines()[1:]
    assert [line.split(": ")[0] for line in lines] == [f"{one}:2", f"{one}:3", f"{two}:2"]


def test_a_split_without_rows_is_said(tmp_path: Path) -> None:
    path = str(write_rows(tmp_path / "a.jsonl", [{"input": "a", "target": "b", "split": "train"}]))
    with pytest.raises(ValueError, match="task 'a' has no test rows, only 1 train"):
        mixture(Task("a", path=path)).setup("test")
    with pytest.raises(ValueError, match="task 'a' has no validation rows"):
        mixture(Task("a", path=path)).setup("validate")
    with pytest.raises(ValueError, match="there are no train rows: all of a are held out"):
        mixture(Task("a", path=path, role="held_out")).setup("fit")
    data = mixture(Task("a", path=path))
    data.setup("fit")
    assert data.val_dataloader() == []


def test_the_log_tells_shares_of_an_epoch_where_tasks_have_any(three: list[Task], caplog) -> None:
    caplog.set_level("INFO", "modular_experts")
    mixture(three[0]).setup("fit")
    mixture(*three[:2]).setup("fit")
    lines = [line for line in caplog.messages if "epoch" in line]
    assert lines == [
        "upper: 12 rows in an epoch",
        *(f"{name}: 12 rows in an epoch, 50.0% of all, each 1.00 times" for name in ("upper", "reverse")),
    ]


def test_the_evaluation_limit_takes_rows_of_each_task_from_all_over_the_file(three: list[Task]) -> None:
    data = mixture(*three, eval_limit=2)
    data.setup("test")
    assert Counter(task for task, _ in served(data.test_dataloader())) == {"upper": 2, "reverse": 2, "first": 2}
    everything = mixture(*three)
    everything.setup("test")
    assert served(data.predict_dataloader())[:2] == served(everything.predict_dataloader())[0:6:3]
    # It holds for inputs, too, but not for inputs of training rows.
    alone, both = data.input_examples(["validation"]), data.input_examples(["train", "validation"])
    assert all(len(rows) == 2 for rows in alone.values())
    every = everything.input_examples(["train", "validation"])
    assert [len(rows) for rows in both.values()] == [len(rows) for rows in every.values()]
    assert all(len(rows) > 2 for rows in both.values())


def test_parts_of_a_mixture_have_the_batches_of_mixtures_of_their_own_and_read_each_task_once(three, monkeypatch):
    reads: Counter[str] = Counter()
    read = Task.read
    monkeypatch.setattr(Task, "read", lambda task, *given: (reads.update([task.name]), read(task, *given))[1])

    def found(data: TaskMixture) -> list[Any]:
        data.setup()
        loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
        batches = [(batch["task"], batch["input_ids"].tolist()) for loader in loaders for batch in loader]
        return [list(data.roles), data.contents, batches]

    whole, parts = mixture(*three, eval_limit=4), (["reverse"], ["first", "upper"], ["reverse", "upper"])
    assert whole.contents.keys() == {"upper", "reverse"}
    shared = [found(whole.only(names)) for names in parts]
    assert reads == {"upper": 1, "reverse": 1, "first": 1}
    by_name = {task.name: task for task in three}
    assert shared == [found(mixture(*map(by_name.get, names), eval_limit=4)) for names in parts]
    assert list(whole.roles) == ["upper", "reverse", "first"]


def test_the_hash_of_a_task_is_that_of_its_contents_alone(tmp_path) -> None:
    """Neither the name of the file, nor how it divides into splits, changes it; one letter does."""
    rows = [{"input": f"word {number}", "target": "a"} for number in range(20)]
    files = {"one": rows, "two": rows, "letter": [rows[0] | {"target": "b"}, *rows[1:]], "order": rows[::-1]}
    hashes = {}
    for name, found in files.items():
        file = write_rows(tmp_path / f"{name}.jsonl", found)
        ratio = 0.3 if name == "two" else 0.1
        data = TaskMixture([{"name": "task", "path": str(file)}], build_tokenizer(), validation_ratio=ratio)
        data.setup("fit")
        hashes[name] = data.contents["task"]["hash"]
        assert sum(data.contents["task"]["rows"].values()) == 20
    assert hashes["one"] == hashes["two"]
    assert len(set(hashes.values())) == 3


def test_the_chat_template_of_an_experts_own_tasks_counts(tmp_path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}:{{ m.content }}<eos>{% endfor %}"
    plain = write_rows(tmp_path / "plain.jsonl", [{"input": "a", "target": "b"}] * 4)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chat = write_rows(tmp_path / "chat.jsonl", [{"messages": turns}] * 4)
    data = TaskMixture([str(plain), str(chat)], tokenizer)
    template = TaskMixture([str(chat)], tokenizer).reading["chat_template"]
    wanted = {("plain",): None, ("chat",): template, ("plain", "chat"): template, ("x",): template}
    assert template
    assert {tasks: data.reading_of(tasks)["chat_template"] for tasks in wanted} == wanted


def test_rows_that_are_also_training_rows_are_counted_once(tmp_path, caplog) -> None:
    def rows(split: str, *inputs: str) -> list[dict[str, object]]:
        return [{"input": text, "target": text, "split": split} for text in inputs]

    found = [*rows("train", "a", "a", "b", "c"), *rows("validation", "d", "a"), *rows("test", "b", "b", "e")]
    found.append({"input": "c", "target": "another", "split": "test"})
    path = write_rows(tmp_path / "copied.jsonl", found)
    for _ in range(2):
        mixture(str(path)).setup("fit")
    (said,) = (record.getMessage() for record in caplog.records if "copies" in record.getMessage())
    assert said == (
        "copied: 1 of 2 validation rows and 2 of 4 test rows are also training rows, which an expert may know by "
        "heart; remove the copies, or give all copies of a row one `split`"
    )
