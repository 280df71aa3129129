"""What a search measures: the loss on rows with labels, or with the answers of each task's own expert."""

import json
import math

import pytest
import torch
from conftest import build_model, build_tokenizer, write_rows
from testbed.runs import mixture
from testbed.searching import objective_on, random_experts, same_bits, state

from modular_experts.base import Base
from modular_experts.base.apply import applied
from modular_experts.data.batch import IGNORED
from modular_experts.deltas import Dense
from modular_experts.library import make_record, open_expert, write_expert
from modular_experts.merging.objective import Objective, Trial, own_experts


def test_rows_of_a_length_share_a_batch_and_batches_of_all_lengths_alternate(tiny_llama_dir, tmp_path) -> None:
    rows = [{"input": "a " * (40 - length), "target": "b", "split": "validation"} for length in range(24)]
    file = write_rows(tmp_path / "lengths.jsonl", rows)
    model = Base.open(tiny_llama_dir).load()
    batches, again = (
        Objective(model, mixture({"lengths": file}, tiny_llama_dir, eval_batch_size=2)).batches["lengths"] for _ in "ab"
    )
    longest = [batch["input_ids"].shape[1] for batch in batches]
    assert sum(batch["attention_mask"].numel() - int(batch["attention_mask"].sum()) for batch in batches) <= 12 * 2
    assert len(longest) == 12
    assert max(longest[:6]) > min(longest[6:])
    assert min(longest[:6]) < max(longest[6:])
    assert all(torch.equal(one["input_ids"], two["input_ids"]) for one, two in zip(batches, again, strict=True))


def test_a_held_out_task_and_one_without_validation_rows_are_refused(tiny_llama_dir, task_files, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"first: the rows of a held-out task are reserved for"):
        Objective(Base.open(tiny_llama_dir).load(), mixture(task_files, tiny_llama_dir))
    file = write_rows(tmp_path / "tests.jsonl", [{"input": "a", "target": "b", "split": "test"}])
    with pytest.raises(ValueError, match=r"task 'tests' has no validation rows, only 1 test"):
        Objective(Base.open(tiny_llama_dir).load(), mixture({"tests": file}, tiny_llama_dir))


def test_what_is_no_number_never_wins() -> None:
    trials = [Trial({}, {"a": math.nan, "b": 0.0}), Trial({}, {"a": 9.0, "b": 9.0})]
    assert min(trials, key=lambda trial: trial.loss) is trials[1]
    assert trials[0].loss == math.inf


def named(folder, **tasks):
    """Return stored experts by name, whose records name tasks."""
    base = {"id": "base", "revision": None, "fingerprint": "f" * 64}
    for name, several in tasks.items():
        write_expert(folder / name, {"w": Dense(torch.ones(2, 2))}, make_record("SparseExpert", base, tasks=several))
    return [open_expert(folder / name) for name in tasks]


def test_the_record_tells_whose_task_it_is_and_the_fewest_tasks_win(tmp_path) -> None:
    one, two, both = named(tmp_path, one=["a"], two=["b"], both=["a", "b", "c"])
    assert own_experts([both, one, two], ["a", "b", "c"]) == {"a": one, "b": two, "c": both}
    assert own_experts([both, one, two], ["a", "b"], {"b": tmp_path / "both"}) == {"a": one, "b": both}


MISTAKES = [
    ({"one": ["a"], "two": ["b"]}, ["a", "c"], {}, r"no record names the task c; name the .*expert_of=\{c: .*one\}"),
    ({"one": ["a"], "two": ["a"]}, ["a"], {}, r"records of .*one and .*two name the task a; name the expert that"),
    ({"one": ["a"]}, ["a"], {"b": "one"}, "expert_of names 'b', which is not a task of the data; they are a"),
    ({"one": ["a"]}, ["a"], {"a": "three"}, "expert_of gives a the expert three, which is not among .*one"),
]


@pytest.mark.parametrize(("records", "tasks", "given", "sentence"), MISTAKES)
def test_a_task_whose_expert_cannot_be_told_gets_one_sentence(tmp_path, records, tasks, given, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        own_experts(named(tmp_path, **records), tasks, given)


def lively_model():
    """Return a random model that writes different letters and sometimes ends."""
    model = build_model("llama", seed=3)
    for parameter in model.parameters():
        parameter.data.mul_(4) if parameter.ndim > 1 else None
    model.lm_head.weight.data[1] *= 2
    return model


def greedily(model, ids: list[int], most: int) -> list[int]:
    """Decode alone, without padding or cache, up to and with end-of-sequence."""
    written: list[int] = []
    while len(written) < most and written[-1:] != [1]:
        with torch.no_grad():
            written.append(int(model(input_ids=torch.tensor([ids + written])).logits[0, -1].argmax()))
    return written


def rows_of(objective) -> dict[str, list[tuple[list[int], list[int]]]]:
    """Return the prompt and the labels of each row, by task."""
    return {
        task: [
            (ids[: int((labels != IGNORED).int().argmax())].tolist(), labels[labels != IGNORED].tolist())
            for batch in batches
            for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
        ]
        for task, batches in objective.batches.items()
    }


def test_labels_are_what_the_expert_of_the_task_writes_greedily(tiny_llama_dir, task_files) -> None:
    model = lively_model()
    data = mixture({name: task_files[name] for name in ("upper", "reverse")}, tiny_llama_dir, eval_batch_size=4)
    base = Objective(model, data)
    own = dict(zip(("upper", "reverse"), random_experts(base, size=0.5), strict=False))
    before = state(model)
    objective = Objective(model, data, own, max_new_tokens=5)
    assert same_bits(model, before)
    ended = []
    for task, rows in rows_of(objective).items():
        assert sorted(prompt for prompt, _ in rows_of(base)[task]) == sorted(prompt for prompt, _ in rows)
        with applied(model, own[task], check=False):
            for prompt, labels in rows:
                assert labels == greedily(model, prompt, 5)
                ended.append(labels[-1] == 1)
    assert any(ended)
    assert not all(ended), "an answer that is cut has no end-of-sequence to learn"


@pytest.fixture
def answered(tiny_llama_dir, task_files):
    """Return a function that gives the rows of a file, which an expert answers with some tokens at most."""
    own = {"upper": random_experts(objective_on(tiny_llama_dir, task_files))[0]}

    def rows(file, most: int, **settings):
        data = mixture({"upper": file}, tiny_llama_dir, **settings)
        return rows_of(Objective(lively_model(), data, own, max_new_tokens=most))["upper"]

    return rows


def test_no_target_is_read_where_experts_answer(answered, tmp_path, task_files) -> None:
    kept = []
    rows = [json.loads(line) for line in task_files["upper"].read_text().splitlines()]
    others = [{**row, "target": "another and a longer one", "choices": None} for row in rows]
    inputs = [{name: text for name, text in row.items() if name != "target"} for row in rows]
    for several in (rows, others, inputs):
        kept.append(answered(write_rows(tmp_path / "upper.jsonl", several), 4))
    assert kept[0] == kept[1] == kept[2]


def test_rows_with_neither_target_nor_split_are_asked(answered, tiny_llama_dir, tmp_path) -> None:
    file = write_rows(tmp_path / "upper.jsonl", [{"input": text} for text in ("bat", "fit", "dot")])
    assert len(answered(file, 3)) == 3
    with pytest.raises(ValueError, match="has no 'target'"):
        Objective(lively_model(), mixture({"upper": file}, tiny_llama_dir))
    file.write_text('{"input": "bat", "split": "test"}\n')
    with pytest.raises(ValueError, match="task 'upper' has no validation rows; give some rows the split 'validation'"):
        answered(file, 3)


def test_a_prompt_leaves_room_for_its_answer(answered, tmp_path) -> None:
    file = write_rows(tmp_path / "upper.jsonl", [{"input": "abcdefghijklmnop"}])
    ((prompt, labels),) = answered(file, 4, max_length=12)
    assert build_tokenizer().decode(prompt) == "ijklmnop"
    assert len(prompt) + len(labels) <= 12


def test_a_conversation_is_answered_to_its_last_turn(answered, tmp_path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] + ':' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    talk = [{"role": "user", "content": "bat"}, {"role": "assistant", "content": "BAT"}]
    talk += [{"role": "user", "content": "fit"}]
    rows = [{"messages": messages} for messages in (talk, [*talk, talk[1]], talk[:1])]
    file = write_rows(tmp_path / "upper.jsonl", rows)
    found = answered(file, 3, tokenizer=tokenizer, validation_ratio=0.9, test_ratio=0.0)
    assert sorted(tokenizer.decode(prompt) for prompt, _ in found) == ["u:bat\na:", *["u:bat\na:BAT\nu:fit\na:"] * 2]
