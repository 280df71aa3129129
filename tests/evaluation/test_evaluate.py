"""`evaluate` gives what the command `test` writes, in one call, for one mix of experts or for several, and as files."""

import importlib
import json
import random
import shutil
import sys
from collections import defaultdict
from pathlib import Path
from unittest.mock import patch
from xml.etree import ElementTree

import pytest
import torch
from conftest import CHARACTERS, build_model, build_tokenizer, write_rows
from testbed.random_deltas import random_delta
from testbed.runs import mixture, trainer

from modular_experts import ExpertModule, TaskMixture, apply, evaluate, generate
from modular_experts.__main__ import main
from modular_experts.base import Base
from modular_experts.base.files import fingerprint
from modular_experts.evaluation import TEXT_METRICS, measure
from modular_experts.evaluation.comparison_page import write_comparison
from modular_experts.evaluation.intervals import compared_means
from modular_experts.library import as_parents, make_record, open_expert, write_expert
from modular_experts.reports import Results


@pytest.fixture
def weight(tiny_llama_dir, tmp_path, monkeypatch) -> tuple[str, torch.Tensor]:
    """Store two experts in a library, the second of another base, and return the weight that they move."""
    monkeypatch.chdir(tmp_path)
    name, weight = next((n, w) for n, w in Base.open(tiny_llama_dir).load().named_parameters() if "q_proj" in n)
    for expert, known in (("a", fingerprint(tiny_llama_dir)), ("b", "0" * 64)):
        record = make_record("X", {"id": str(tiny_llama_dir), "fingerprint": known})
        delta = random_delta("Sparse", weight.shape, 1, torch.float32, share=0.5)
        write_expert(f"library/{expert}", [(name, delta)], record)
    return name, weight


def test_it_is_what_the_command_test_measures(tiny_llama_dir, task_files, weight, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["modular-experts"])
    tasks = [{"name": task, "path": str(task_files[task])} for task in ("upper", "reverse")]
    found = evaluate(tiny_llama_dir, "library/a", tasks, max_new_tokens=4)
    assert capsys.readouterr().err.startswith("measuring a: 0 of ")
    model = ["--model.base", str(tiny_llama_dir), "--model.applied", "[library/a]", "--model.max_new_tokens", "4"]
    assert main(["test", *model, "--tasks", json.dumps(tasks)]) == 0
    written = json.loads(Path("runs/results.json").read_text())
    assert len(found.rows) == 6
    for row in found.rows:
        assert row["model"] == "a"
        assert row["experts"] == ["a"]
        assert row["value"] == pytest.approx(written["tasks"][row["task"]][row["metric"]], rel=1e-6)
    assert found.facts["fingerprint"] == fingerprint(tiny_llama_dir)


@pytest.fixture
def other_tokenizer() -> object:
    """A tokenizer of the same characters, with other numbers."""
    with patch("conftest.CHARACTERS", CHARACTERS[::-1]):
        return build_tokenizer()


def test_a_mixture_without_a_tokenizer_takes_each_base_s_own(
    tiny_llama_dir, task_files, other_tokenizer, tmp_path
) -> None:
    build_model("llama", seed=3).save_pretrained(tmp_path / "other")
    other_tokenizer.save_pretrained(tmp_path / "other")
    bases = [tiny_llama_dir, tmp_path / "other", tiny_llama_dir]
    data = TaskMixture([str(task_files["upper"])])
    part = data.only(["upper"])
    assert part.take_tokenizer(bases[1]).get_vocab() == other_tokenizer.get_vocab()
    apart = [evaluate(base, [], TaskMixture([str(task_files["upper"])]), None).rows for base in bases]
    assert [evaluate(base, [], data, None).rows for base in bases] == apart
    assert apart[0] != apart[1]


def test_answers_are_read_with_the_tokenizer_that_read_the_rows(
    tiny_llama_dir, tmp_path, other_tokenizer, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    inputs = [f"ask {number}" for number in range(4)]
    rows = lambda targets: [  # noqa: E731
        {"input": one, "target": target, "split": "test"} for one, target in zip(inputs, targets, strict=True)
    ]
    data = lambda: TaskMixture(str(tmp_path / "asked.jsonl"), other_tokenizer)  # noqa: E731
    write_rows(tmp_path / "asked.jsonl", rows("abcd"))
    asked = data()
    asked.setup("test")
    model = Base.open(tiny_llama_dir).load("float32")
    found = measure(model, other_tokenizer, asked.test_dataloader(), asked.roles, 4, examples=4)["examples"]["asked"]
    write_rows(tmp_path / "asked.jsonl", rows([one["answer"] for one in found]))
    scores = evaluate(tiny_llama_dir, [], data(), 4).rows
    module = ExpertModule(str(tiny_llama_dir), max_new_tokens=4)
    trainer(tmp_path).test(module, data(), verbose=False)
    assert [row["value"] for row in scores if row["metric"] == "exact_match"] == [1.0]
    assert module.results["tasks"]["asked"]["exact_match"] == 1.0


def test_a_task_vector_is_one_expert_and_a_metric_may_be_the_users(tiny_llama_dir, task_files, weight) -> None:
    vector = {weight[0]: random_delta("Dense", weight[1].shape, 2, torch.float32)}
    metrics = TEXT_METRICS | {"both": lambda generated, target: len(generated) + 100 * len(target)}
    found = evaluate(tiny_llama_dir, vector, mixture(task_files, tiny_llama_dir), 3, metrics=metrics)
    assert found.values("model") == ["task vector"]
    assert found.values("metric") == ["loss", "exact_match", "rougeL", "both"]
    lengths = {"upper": 3, "reverse": 3, "first": 1}
    for task, length in lengths.items():
        assert 100 * length <= found.mean("both", task=task) <= 100 * length + 3
    with pytest.raises(ValueError, match="two models are called a; give each a name of its own"):
        evaluate(tiny_llama_dir, {"": "library/a", "a": []}, mixture(task_files, tiny_llama_dir), 3)


def test_a_metric_of_the_users_is_measured_where_others_are_stored(tiny_llama_dir, task_files, weight, monkeypatch):
    given = ("library/a", mixture(task_files, tiny_llama_dir), 3)
    evaluate(tiny_llama_dir, *given, out="runs/a")
    metrics = TEXT_METRICS | {"target": lambda generated, target: float(len(target))}
    found = evaluate(tiny_llama_dir, *given, metrics=metrics, out="runs/a", overwrite=True)
    assert found.mean("target", task="first") == 1.0
    # By its path a metric is known, with the code of its file, so its results are stored, too.
    measured, lines = Path("runs/a/measured.jsonl"), []
    # Compiled code counts for a source of the same second and size.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for factor in (1, 2, 2):
        Path("mine.py").write_text(f"def wide(answer, target):\n    return {factor} * len(target)\n")
        monkeypatch.syspath_prepend(Path.cwd())
        monkeypatch.delitem(sys.modules, "mine", raising=False)
        importlib.invalidate_caches()
        found = evaluate(tiny_llama_dir, *given, metrics=["mine.wide"], out="runs/a", overwrite=True)
        assert found.mean("wide", task="first") == factor
        lines.append(len(measured.read_text().splitlines()))
    assert lines == [2, 3, 3]


def test_a_checkpoint_measures_as_base_and_expert_do(tiny_llama_dir, task_files, weight, tmp_path) -> None:
    apply(["library/a"], "checkpoint", tiny_llama_dir)
    data = mixture(task_files, tiny_llama_dir)
    # The base comes behind an expert, which must have left it.
    mixes = {"a": "library/a", "base": [], "path": ["checkpoint"], "opened": Base.open("checkpoint")}
    found = evaluate(tiny_llama_dir, mixes, data, 4, out="runs/checkpoint")
    scores = {name: [row["value"] for row in found.where(model=name).rows] for name in mixes}
    assert scores["a"] == scores["path"] == scores["opened"] != scores["base"]
    assert found.facts["models"]["path"] == [{"name": "checkpoint", "place": "checkpoint"}]
    assert len(Path("runs/checkpoint/measured.jsonl").read_text().splitlines()) == 3  # two are one checkpoint
    assert "checkpoint" in Path("runs/checkpoint/report.html").read_text()


def test_an_expert_without_those_beneath_it_is_warned_of(tiny_llama_dir, task_files, weight, caplog) -> None:
    under = open_expert("library/a")
    write_expert("library/top", (under * 2.0).items(), under.record | {"parents": as_parents([under])})
    mixes = {"alone": ["library/top"], "both": ["library/a", "library/top"]}
    evaluate(None, mixes, mixture(task_files, tiny_llama_dir), max_new_tokens=None)
    generate(None, "upper bat:", ["library/top"], max_new_tokens=1)
    sentences = [one.message for one in caplog.records if "will be missed" in one.message]
    assert sentences == ["top was trained on top of a, which is not listed and will be missed"] * 2


@pytest.fixture
def compare(tiny_llama_dir, task_files, weight, capsys):
    """Run the command on two tasks and a held-out one; return the exit code, and what it wrote to stdout and stderr."""

    def command(*more: str) -> tuple[int, str, str]:
        files = [str(task_files[task]) for task in ("upper", "reverse")]
        words = ["--base", str(tiny_llama_dir), "--tasks", *files, "--held-out", str(task_files["first"])]
        code = main(["evaluate", *words, "--max_new_tokens", "4", *more])
        return code, *capsys.readouterr()

    return command


def test_the_command_prints_a_table_and_writes_results_and_a_page(compare) -> None:
    code, out, err = compare("--experts", "library/a", "twice=library/a+library/a", "--out", "cmp")
    assert code == 0, err
    results = Results.read("cmp/results.json")
    assert results.values("model") == ["base", "a", "twice"]
    assert results.values("role") == ["held_in", "held_out"]
    lines = [line.split() for line in out.splitlines()]
    for model in ("base", "a", "twice"):
        loss = results.mean("loss", model=model, role="held_in")
        assert [model, "held-in", "12", f"{loss:.3f}"] in [line[:4] for line in lines]
    # No model has an answer right, so the loss tells them apart.
    for task in ("upper", "reverse", "first"):
        values = [results.mean("loss", task=task, model=model) for model in results.values("model")]
        assert [task, *[f"{value:.3f}" for value in values]] in lines
    assert max(map(len, out.splitlines())) <= 80
    assert "the page is cmp/report.html" in out
    assert "measuring base: 0 of 54 rows" in err
    assert "measuring twice: 54 of 54 rows" in err
    page = ElementTree.fromstring(Path("cmp/report.html").read_text().partition("\n")[2])
    examples = [item for item in page.iter("dl") if item.get("class") == "example"]
    assert len(examples) == 4  # one that tells the most, and one of each task
    assert ["".join(name.itertext()) for name in examples[0].iter("dt")] == ["input", "wanted", "base", "a", "twice"]
    answer = results.facts["examples"][0]
    assert answer["input"].startswith(f"{answer['task']} ")
    assert set(answer["answers"]) == {"base", "a", "twice"}


def test_the_command_writes_nothing_without_out(compare) -> None:
    before = sorted(Path().rglob("*"))
    code, out, _ = compare("--experts", "library/a")
    assert (code, "report.html" in out) == (0, False)
    assert [line.split()[0] for line in out.splitlines() if "held-in" in line] == ["base", "a"]
    assert sorted(Path().rglob("*")) == before
    assert "--open shows the page, which evaluate writes only with --out DIR" in compare("--open")[2]


def test_a_comparison_goes_on_where_it_was_and_measures_only_what_is_new(compare) -> None:
    assert compare("--experts", "library/a", "--out", "cmp")[0] == 0
    first = Results.read("cmp/results.json")
    code, _, err = compare("--experts", "library/a", "--out", "cmp")
    assert code == 1
    assert "results.json exists already; choose another place, or replace it with --overwrite" in err
    Path("cmp/results.json").unlink()  # as an interruption leaves it
    code, _, err = compare("--experts", "library/a", "a2=library/a+library/a", "--out", "cmp")
    assert code == 0
    assert err.startswith("measuring a2: 0 of 18 rows\n")
    assert "measuring a2: 16 of 18 rows, 0:00:0" in err
    again = Results.read("cmp/results.json")
    # Which model leads depends on the others.
    before, after = ([row | {"leads": 0} for row in one.where(model="a").rows] for one in (first, again))
    assert after == before
    assert len(Path("cmp/measured.jsonl").read_text().splitlines()) == 3
    assert compare("--experts", "library/a", "--out", "cmp", "--overwrite", "--eval_limit", "3")[0] == 0
    assert Results.read("cmp/results.json").where(model="a").rows[0]["rows"] == 3


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_results_of_a_base_that_has_changed_since_are_measured_anew(tiny_llama_dir, task_files, weight, file) -> None:
    base = shutil.copytree(tiny_llama_dir, "base")
    given = {"base": [], "a": "library/a", "whole": shutil.copytree(tiny_llama_dir, "checkpoint")}
    measured = Path("runs/a/measured.jsonl")

    def loss(out: str | None) -> list[float]:
        data = mixture({"upper": task_files["upper"]}, base)
        rows = evaluate(base, given, data, None, out=out, overwrite=True).rows
        return [row["value"] for row in rows]

    before = loss("runs/a")
    assert loss("runs/a") == before
    assert len(measured.read_text().splitlines()) == 3
    for place in ("base", "checkpoint"):
        config = json.loads(Path(place, file).read_text())
        Path(place, file).write_text(json.dumps(config | {"rms_norm_eps": 0.5, "model_max_length": 99}))
    assert loss("runs/a") == loss(None)
    assert len(measured.read_text().splitlines()) == 6
    assert (before != loss(None)) == (file == "config.json")


@pytest.mark.parametrize(
    ("right", "leader"),
    [
        ({"base": [30, 30], "a": [31, 30]}, "All models are level on held-in tasks: exact 75.0 % and 76.2 %"),
        (
            {"base": [0, 0], "a": [40, 0], "b": [39, 0]},
            "a and b are level and lead on held-in tasks: exact 50.0 % and 48.8 %, base 0.0 %",
        ),
        ({"base": [40, 0], "a": [0, 20]}, "base is best on held-in tasks: exact 50.0 %"),
    ],
)
def test_no_model_is_called_best_unless_the_interval_of_the_difference_says_so(tmp_path, right, leader) -> None:
    values, rows = defaultdict(dict), []
    for model, counts in right.items():
        for task, many in zip("xy", counts, strict=True):
            values[model][task] = {"exact_match": [float(row < many) for row in range(40)]}
            row = {"model": model, "experts": [], "task": task, "role": "held_in", "rows": 40}
            rows.append(row | {"metric": "exact_match", "value": many / 40})
    means = compared_means(rows, values)
    facts = {"versions": {"modular-experts": "0"}, "date": "", "examples": [], "models": {}, "base": "", "machine": ""}
    results = Results(rows, facts | {"dtype": "", "max_new_tokens": 3, "means": means})
    write_comparison(results, tmp_path / "page.html")
    page = Path(tmp_path / "page.html").read_text().replace("&#160;", " ")
    assert leader in page
    leading = [one["model"] for one in means if one["leads"]]
    table = ElementTree.fromstring(results.html())
    lines = {line.findtext("th"): line for line in table.iter("tr")}
    marked = [name for name in right if any("best" in cell.get("class", "") for cell in lines[name].iter("td"))]
    named = [] if "All" in leader else leader.partition(" is ")[0].partition(" are ")[0].split(" and ")
    assert marked == leading == named
    assert f"{100 * (means[0]['interval'][1] - means[0]['interval'][0]) / 2:.1f}" in lines["base"][2].text


def test_the_interval_of_a_loss_is_over_tokens_and_of_a_difference_over_the_same_rows() -> None:
    draw = random.Random(0)
    tokens = [draw.choice([1.0, 9.0]) for _ in range(300)]
    sums = {"base": [count * draw.gauss(2.0, 1.0) for count in tokens]}
    sums |= {"a": [value - 0.01 * count for value, count in zip(sums["base"], tokens, strict=True)]}
    values = {model: {"x": {"loss": own, "tokens": tokens}} for model, own in sums.items()}
    rows = [
        {"model": model, "task": "x", "role": "held_in", "metric": "loss", "value": sum(own) / sum(tokens)}
        for model, own in sums.items()
    ]
    compared_means(rows, values)
    # The delta method: a ratio of two sums has the error of its residuals.
    residuals = [value - rows[0]["value"] * count for value, count in zip(sums["base"], tokens, strict=True)]
    error = 1.96 * sum(one**2 for one in residuals) ** 0.5 / sum(tokens)
    low, high = rows[0]["interval"]
    assert [low, high] == pytest.approx([rows[0]["value"] - error, rows[0]["value"] + error], abs=0.2 * error)
    # Each interval holds the other mean, and yet every row is better.
    assert low < rows[1]["value"] < high
    assert [row["leads"] for row in rows] == [False, True]
    # A model with a loss that is no number does not lead.
    losses, of = {"a": float("nan"), "b": 1.0}, {"task": "x", "role": "held_in", "metric": "loss"}
    rows = [of | {"model": model, "value": value} for model, value in (("a", None), ("b", 1.0))]
    compared_means(rows, {model: {"x": {"loss": [value] * 2, "tokens": [1.0] * 2}} for model, value in losses.items()})
    assert [row["leads"] for row in rows] == [False, True]
    assert [row["interval"] for row in rows] == [None, [1.0, 1.0]]
    # One row tells nothing about others.
    rows = [of | {"model": model, "value": value} for model, value in (("a", 0.9), ("b", 1.0))]
    compared_means(rows, {row["model"]: {"x": {"loss": [row["value"]], "tokens": [1.0]}} for row in rows})
    assert [(row["interval"], row["leads"]) for row in rows] == [(None, False)] * 2
