"""The generated suite: every answer is right, no test word is trained on, and the same seed gives the same rows."""

import itertools

import pytest

from modular_experts.data.suite import HELD_IN, HELD_OUT, LETTERS, WordTask, split_of

ALL = (*HELD_IN, *HELD_OUT)
EXAMPLE = {  # for the word "feda", by hand
    "reverse": "adef",
    "upper": "FEDA",
    "first-two": "fe",
    "count-letters": "4",
    "largest": "f",
    "has-a": "Y",
    "reverse-upper": "ADEF",
    "copy": "feda",
    "next": "gfeb",
    "last-two": "da",
    "count-vowels": "2",
    "ends-alike": "N",
    "sort": "adef",
    "previous": "edch",
    "drop-first": "eda",
    "rotate-left": "edaf",
    "star-vowels": "f*d*",
    "drop-last": "fed",
    "swap-ends": "aedf",
    "mirror": "cdeh",
    "rotate-right": "afed",
    "next-but-one": "hgfc",
    "drop-ends": "ed",
    "count-low": "2",
    "smallest": "a",
    "has-h": "N",
    "first-two-upper": "FE",
    "sort-down": "feda",
}


def test_the_suite_has_twenty_tasks_to_train_and_eight_to_test() -> None:
    assert (len(HELD_IN), len(HELD_OUT)) == (20, 8)
    assert len({task.name() for task in ALL}) == len({task.instruction for task in ALL}) == 28
    held_in = {task.instruction.split()[0] for task in HELD_IN}
    assert {task.instruction.split()[0] for task in HELD_OUT} == held_in  # each has relatives among the held-in ones


@pytest.mark.parametrize("task", ALL, ids=lambda task: task.name())
def test_the_answer_is_right_and_each_word_comes_once(task: type[WordTask]) -> None:
    assert task().answer("feda") == EXAMPLE[task.name()]
    rows = list(task(train=30, validation=5, test=10).rows())
    assert [sum(row["split"] == split for row in rows) for split in ("train", "validation", "test")] == [30, 5, 10]
    words = [row["input"].removeprefix(task.instruction).removesuffix("=").replace(" ", "") for row in rows]
    assert len(set(words)) == len(words)
    assert set("".join(words)) <= set(LETTERS)
    assert all(row["target"] == " ".join(task().answer(word)) for row, word in zip(rows, words, strict=True))


def test_no_word_is_in_two_splits_in_any_task_or_seed() -> None:
    seen: dict[str, set[str]] = {}
    for seed, task in enumerate(ALL):
        for row in task(seed=seed, train=200, validation=20, test=40, chatty=seed % 2 == 0).rows():
            word = row["input"].split(task.instruction)[1].rstrip("= ").replace(" ", "")
            seen.setdefault(word, set()).add(row["split"])
    assert all(len(splits) == 1 for splits in seen.values())


def test_one_word_in_five_is_for_tests_and_one_in_ten_for_validation() -> None:
    words = ["".join(letters) for letters in itertools.product(LETTERS, repeat=4)]
    splits = [split_of(word) for word in words]
    assert [splits.count(split) / len(words) for split in ("test", "validation")] == pytest.approx([0.2, 0.1], abs=0.02)


def test_the_same_seed_gives_the_same_rows_and_another_others() -> None:
    one, again, other = (list(HELD_IN[0](seed=seed, train=20).rows()) for seed in (1, 1, 2))
    assert one == again
    assert one != other


@pytest.mark.parametrize("counts", [{"train": -1}, {"validation": 10_001}])
def test_more_rows_than_can_be_drawn_are_refused(counts: dict[str, int]) -> None:
    ((split, count),) = counts.items()
    with pytest.raises(ValueError, match=rf"{split}={count} must be from 0 to "):
        HELD_IN[0](**counts)


def test_a_chatty_target_repeats_the_word() -> None:
    row = next(HELD_IN[0](chatty=True).rows())
    word, answer = row["target"].split(" , ")
    assert row["input"] == f"order reverse {word} ="
    assert answer == word[::-1]
