"""The lm-evaluation-harness measures what `evaluate` measures, experts in place as checkpoints, with no network."""

import json
import socket
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import build_model, build_tokenizer, write_rows
from testbed.random_deltas import random_delta

from modular_experts import evaluate
from modular_experts.base import Base
from modular_experts.base.files import fingerprint
from modular_experts.data import TaskMixture
from modular_experts.evaluation import measure
from modular_experts.evaluation.harness import Measuring, harness, harness_tasks
from modular_experts.injection.attach import attached
from modular_experts.library import make_record, write_expert
from modular_experts.merging.route import route
from modular_experts.merging.statistics import take_statistics
from modular_experts.reports import Results
from modular_experts.routing import Centroid

WORDS = [first + middle + last for first in "bdfgkl" for middle in "aeio" for last in "nt"]
ENDS = [":", " ->\n", " is ", "?"]
TOKENS = 4


def rows_of(number: int) -> list[dict[str, Any]]:
    """Return the rows of one of the tasks, half of them for validation."""
    rows = []
    for row, word in enumerate(WORDS):
        asked, split = word if number else f"{word} {word}", "test" if row % 2 else "validation"
        answers = {"target": word[::-1], "choices": [word + "s", word[::-1], word * 2]}
        rows.append({"input": asked + ENDS[row % 8 // 2], "split": split} | answers)
    return rows


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an expert for each of two tasks, and a router over both; models answer some of the rows right."""
    pytest.importorskip("lm_eval", reason="pip install 'modular-experts[eval]'")
    folder = tmp_path_factory.mktemp("harness")
    base, library = folder / "base", folder / "library"
    build_model("llama").save_pretrained(base)
    build_tokenizer().save_pretrained(base)
    opened = Base.open(base)
    model, tokenizer = opened.load(), opened.tokenizer()
    moved = {name: weight for name, weight in model.named_parameters() if "q_proj" in name or "down_proj" in name}
    for number, task in enumerate(("turn", "say")):
        deltas = [(n, random_delta("Sparse", w.shape, number, torch.float32, share=0.5)) for n, w in moved.items()]
        record = make_record("X", {"id": str(base), "fingerprint": fingerprint(base)}, tasks=[task])
        write_expert(library / task, deltas, record)
        rows = rows_of(number)
        file = write_rows(folder / f"{task}.jsonl", rows)
        # Every other test row has what a model with the expert writes as its target.
        data = TaskMixture([file], tokenizer)
        data.setup("test")
        with attached(model, library / task):
            said = measure(model, tokenizer, data.test_dataloader(), data.roles, TOKENS, examples=99)["examples"][task]
        for row, answer in list(zip([row for row in rows if row["split"] == "test"], said, strict=True))[::2]:
            assert row["input"] == answer["input"]
            row["target"] = answer["answer"] or row["target"]
            row["choices"] = [word for word in row["choices"] if word != row["target"]] + [row["target"]]
        write_rows(file, rows)
    experts = [library / "turn", library / "say"]
    take_statistics(experts, "prompts", TaskMixture([folder / "turn.jsonl", folder / "say.jsonl"]))
    route(experts, library / "routed", Centroid(reject=None))
    return folder


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fail at any connection, and keep tables of datasets out of the user's cache."""

    def refuse(*address: object) -> None:
        raise AssertionError(f"something connects to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def numbers(results: Results) -> dict[tuple[str, str, str], float]:
    """Return what the harness measures of results, by model, task and metric."""
    metrics = ("exact_match", "choice_accuracy")
    measured = [row for row in results.rows if row["metric"] in metrics]
    return {(row["model"], row["task"], row["metric"]): row["value"] for row in measured}


def test_both_types_of_task_have_the_scores_of_evaluate(place, tmp_path, no_network):
    library, tasks = place / "library", [place / "turn.jsonl", {"path": str(place / "say.jsonl"), "role": "held_out"}]
    models = {"base": [], "turn": library / "turn", "sum": [library / "turn", library / "say"], "again": []}
    models["routed"] = library / "routed"
    found = harness(None, models, tasks, out=tmp_path, measuring=Measuring(max_new_tokens=TOKENS, batch_size=5))
    assert numbers(found) == pytest.approx(numbers(evaluate(None, models, tasks, max_new_tokens=TOKENS)))
    for metric in ("exact_match", "choice_accuracy"):
        assert 0 < found.mean(metric, model="turn", task="turn") < 1
        values = [row["value"] for row in found.where(metric=metric).rows]
        assert len(values) == 2 * len(models)
        assert found.mean(metric, model="again") == found.mean(metric, model="base")
    row = found.where(model="turn", task="say", metric="choice_accuracy").rows[0]
    assert (row["role"], row["experts"], row["rows"]) == ("held_out", ["turn"], len(WORDS) // 2)
    # The standard error of a mean of zeros and ones.
    share, count = row["value"], row["rows"]
    assert row["stderr"] == pytest.approx((share * (1 - share) / (count - 1)) ** 0.5)
    kept = Results.read(tmp_path / "results.json")
    assert kept.rows == json.loads(json.dumps(found.rows))
    facts = kept.facts["harness"]
    assert facts["batch_size"] == 5
    assert facts["version"].startswith("0.4.")
    assert facts["tasks"]["say_choices"]["version"] == 1.0
    assert facts["tasks"]["say"]["content_hash"] != facts["tasks"]["turn"]["content_hash"]
    with pytest.raises(FileExistsError, match=r"results\.json exists already.*`overwrite=True`"):
        harness(None, models, tasks, out=tmp_path)


def test_demonstrations_of_a_task_file_are_those_of_evaluate(place, tmp_path, no_network):
    models = {"turn": place / "library" / "turn"}
    file = tmp_path / "turn.jsonl"
    file.write_text((place / "turn.jsonl").read_text().replace('"validation"', '"train"'))
    data = TaskMixture([file], shots=2)
    shown = numbers(evaluate(None, models, data, max_new_tokens=TOKENS))
    measuring = Measuring(shots=2, max_new_tokens=TOKENS)
    assert numbers(harness(None, models, [file], measuring=measuring)) == pytest.approx(shown)
    assert shown != numbers(evaluate(None, models, [file], max_new_tokens=TOKENS))


def export_tasks(place: Path, out: Path) -> list[str]:
    """Write tasks of the harness, with their rows, as files."""
    out.mkdir()
    tasks = harness_tasks(TaskMixture([place / "turn.jsonl"]), Base.open(place / "base").tokenizer(), TOKENS)
    for name, task in tasks.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in task.rows))
        rows = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}}}
        (out / f"{name}.yaml").write_text(yaml.safe_dump(task.settings | rows, sort_keys=False))
    return list(tasks)


def test_benchmarks_are_measured_by_their_names_with_the_harness_s_metrics(place, tmp_path, no_network, monkeypatch):
    from lm_eval.tasks import TaskManager

    # In the place of the harness's own tasks, whose data are on the hub; the index of those takes ten seconds.
    names = export_tasks(place, tmp_path / "tasks")
    only = partial(TaskManager, include_path=tmp_path / "tasks", include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda include_defaults=True: only())
    monkeypatch.chdir(tmp_path / "tasks")
    expert = place / "library" / "turn"
    tasks = [",".join(names), place / "say.jsonl"]
    found = harness(None, {"turn": expert}, tasks, measuring=Measuring(5, max_new_tokens=TOKENS))
    measured = [("say", "exact_match"), ("say", "choice_accuracy"), ("turn", "exact_match"), ("turn_choices", "acc")]
    assert [(row["task"], row["metric"]) for row in found.rows] == measured
    assert [(row["role"], row["rows"]) for row in found.rows] == [("held_in", 5)] * 2 + [("held_out", 5)] * 2
    with pytest.raises(ValueError, match=r"'turn_choice' is neither a file nor a task .*; did you mean turn_choices"):
        harness(None, expert, "turn_choice")
    group = {"group": "whole", "task": ["turn_choices"], "aggregate_metric_list": [{"metric": "acc"}]}
    (tmp_path / "tasks" / "whole.yaml").write_text(yaml.safe_dump(group))
    found = harness(None, expert, "whole", measuring=Measuring(5))
    # The mean over benchmarks counts the group once.
    assert [(row["task"], row["role"], row["rows"]) for row in found.rows] == [
        ("whole", "held_out", 5),
        ("turn_choices", None, 5),
    ]
    # Examples in the prompt: those that a benchmark asks for or the caller, and the same ones for each model.
    settings = tmp_path / "tasks" / "turn_choices.yaml"
    settings.write_text(settings.read_text().replace("num_fewshot: 0\n", ""))
    twice = {"one": expert, "two": expert}
    how = [Measuring(shots=shots, max_new_tokens=TOKENS) for shots in (None, 3)]
    scores = [harness(None, twice, ",".join(names), measuring=one) for one in how]
    asked = [found.facts["harness"]["tasks"] for found in scores]
    assert [found["turn_choices"]["num_fewshot"] for found in asked] == [0, 3]
    assert [found["turn"]["num_fewshot"] for found in asked] == [0, 0]
    one, two = ([row["value"] for row in scores[1].where(model=model).rows] for model in twice)
    assert one == two
    (tmp_path / "tasks" / "turn.jsonl").unlink()
    with pytest.raises(ValueError, match=r"the harness could not load turn .*from the cache of datasets"):
        harness(None, expert, "turn")


def test_the_command_shows_models_side_by_side(place, tmp_path, run, monkeypatch, no_network):
    monkeypatch.chdir(place)
    what = ["--base", "base", "--experts", "a=library/turn", "--tasks", "turn.jsonl", "--max_new_tokens", TOKENS]
    code, out, err = run("harness", *what, "--out", tmp_path / "o")
    assert code == 0, err
    assert out.startswith("measuring base, 1 of 2\nmeasuring a, 2 of 2\n")
    found = Results.read(tmp_path / "o" / "results.json")
    values = [found.mean("choice_accuracy", model=model) for model in ("base", "a")]
    line = next(line for line in out.splitlines() if line.strip().startswith("turn choice_accuracy"))
    assert line.split()[2:] == [f"{value:.4f}" for value in values]


def test_a_quantised_base_is_measured_as_evaluate_measures_it(place, no_network):
    pytest.importorskip("bitsandbytes")
    models, tasks = {"base": [], "turn": place / "library" / "turn"}, [place / "turn.jsonl"]
    how = {"max_new_tokens": TOKENS, "batch_size": 5, "quantise": "int8"}
    base = Base.open(place / "base")
    found = harness(base, models, tasks, measuring=Measuring(**how))
    assert base.quantise is None, "the caller's base is as it was"
    wanted = evaluate(Base.open(place / "base", quantise="int8"), models, tasks, max_new_tokens=TOKENS)
    assert numbers(found) == pytest.approx(numbers(wanted))
    assert found.facts["dtype"] == "float32, int8"


def test_a_choice_ends_with_end_of_sequence_and_begins_where_our_own_begins(tmp_path):
    data = TaskMixture([write_rows(tmp_path / "turn.jsonl", rows_of(0))])
    settings, rows = harness_tasks(data, build_tokenizer())["turn_choices"]
    texts = [(row["input"][-1], settings["target_delimiter"] + choice) for row in rows for choice in row["choices"]]
    assert {(end, len(text) - len(text.lstrip())) for end, text in texts} == {(":", 1), ("\n", 0), (" ", 0), ("?", 1)}
    assert all(choice.endswith("<eos>") for row in rows for choice in row["choices"])
