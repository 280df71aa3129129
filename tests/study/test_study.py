"""A study does each piece once, a change redoes only what depends on it, and a failure stops only what needs it."""

import base64
import gc
import gzip
import json
import re
import resource
import shutil
import sys
import weakref
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from conftest import write_rows
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file, save_file
from testbed.here import STUDY, work_here

from modular_experts import LoRAExpert, distill_into, fit
from modular_experts.__main__ import main
from modular_experts.data import TaskMixture
from modular_experts.evaluation import evaluate
from modular_experts.library import Library, open_expert, open_statistics
from modular_experts.library.atomic import locked
from modular_experts.merging.tune import tune
from modular_experts.methods import TIES
from modular_experts.reports import Results
from modular_experts.study import pieces_of, read_study, work
from modular_experts.study.pieces import title_of
from modular_experts.study.run import PIECES
from modular_experts.study.work import QUIET

LORA = {"expert": {"class_path": "LoRAExpert", "init_args": {"rank": 2}}, "modules": "all-linear", "steps": 1}
EACH = ("lora-upper", "lora-reverse", "multitask")
SPARSE = {"expert": {"class_path": "SparseExpert", "init_args": {"keep_ratio": 0.1}}, "modules": ["q_proj"], "steps": 1}


@pytest.fixture
def settings(tmp_path, one_block, task_files, monkeypatch) -> dict[str, Any]:
    """A small study in the current directory, of tasks that nothing else knows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["modular-experts"])
    (tmp_path / "base").symlink_to(one_block)
    for name, file in (task_files | dict.fromkeys(("third", "fourth"), task_files["first"])).items():
        shutil.copy(file, f"{name}.jsonl")
    return {
        "base": "base",
        "tasks": {"held_in": ["upper.jsonl", "reverse.jsonl"], "held_out": ["first.jsonl"]},
        "experts": {"lora": LORA},
        "merges": ["SparseAverage"],
        "max_new_tokens": 3,
    }


def study(settings: dict[str, Any], *words: str) -> int:
    """Run the command in this process, and return its exit code."""
    Path("study.yaml").write_text(yaml.safe_dump(settings))
    return main(["study", "--config", "study.yaml", "--out", "runs/mine", "--processes", "1", *words])


def lines() -> list[dict[str, Any]]:
    """Return the lines of the pieces that were done, in order."""
    return [json.loads(line) for line in Path("runs/mine", PIECES).read_text().splitlines()]


def names(found: list[dict[str, Any]]) -> list[str]:
    return [" ".join(map(str, line["key"][:-1])) for line in found]


def redone(settings: dict[str, Any], *words: str) -> list[str]:
    """Run the command again, and return the pieces that it did."""
    before = len(lines())
    assert study(settings, *words) == 0
    return sorted(names(lines()[before:]))


def numbers(place: str = "runs/mine") -> list[Any]:
    """Return what a study measured, without times."""
    return [(row["model"], row["task"], row["metric"], row["value"], row["interval"]) for row in results(place).rows]


def results(place: str = "runs/mine") -> Results:
    return Results.read(f"{place}/results.json")


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch) -> None:
    """Nothing is imported anew; `test_study_killed.py` starts processes."""
    work_here(monkeypatch, *STUDY)
    work.load.cache_clear()


class Watch(Callback):
    """Remembers the models that are trained, without holding them, and fails at the end of the second training."""

    trained: ClassVar[list[weakref.ref]] = []

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        assert trainer.optimizers[0].state
        self.trained.append(weakref.ref(module.model))
        if len(self.trained) == 2:
            raise ValueError("this training fails")


def test_one_expert_learns_what_the_experts_of_a_kind_predict(settings, capsys) -> None:
    way = {"distill": LORA["expert"], "steps": 2, "rows": 8, "batch_size": 4, "learning_rate": 0.01}
    assert study(settings | {"merges": [way]}) == 0
    assert "LoRAExpert(rank=2) distilled" in capsys.readouterr().out
    (line,) = [line for line in lines() if line["key"][0] == "merges"]
    assert line["result"]["made_of"].keys() == {"lora-upper", "lora-reverse"}
    experts = [f"runs/mine/library/{name}" for name in ("lora-upper", "lora-reverse")]
    how = {"steps": 2, "rows": 8, "batch_size": 4, "learning_rate": 0.01, "max_new_tokens": 3, "trainer": QUIET}
    data = TaskMixture(["upper.jsonl", "reverse.jsonl"])
    own = distill_into(experts, "own", partial(LoRAExpert, rank=2), tasks=data, **how)
    assert Library("runs/mine/library")["merge-lora-LoRAExpert-rank-2-distilled"].content_hash == own.content_hash
    assert redone(settings | {"merges": [way | {"steps": 3}]}) == ["merges lora LoRAExpert(rank=2) distilled 2 0 0"]
    for wrong, sentence in (({"steps": "many"}, "steps"), ({"merges": []}, "has no setting 'merges'")):
        with pytest.raises(ValueError, match=sentence):
            read_study(**settings | {"merges": [way | wrong]})


def test_stored_experts_of_each_seed_are_those_of_the_base_of_this_seed(settings, one_block) -> None:
    for seed in (0, 1):
        shutil.copytree(one_block, f"base-{seed}")
        weights = load_file(f"base-{seed}/model.safetensors")
        save_file(
            {name: weight + seed for name, weight in weights.items()},
            f"base-{seed}/model.safetensors",
            {"format": "pt"},
        )
        for task in ("upper", "reverse"):
            fit(f"base-{seed}", f"{task}.jsonl", LoRAExpert, "q_proj", f"stored-{seed}/{task}", steps=1, trainer=QUIET)
    stored = {"base": "base-{seed}", "experts": {"lora": {"stored": "stored-{seed}"}}, "seeds": [0, 1]}
    assert read_study(**settings | stored).seeds == (0, 1)
    with pytest.raises(ValueError, match="was trained on another base than base-1"):
        read_study(**settings | stored | {"experts": {"lora": {"stored": "stored-0"}}})


def test_the_base_behind_demonstrations_is_a_row_of_its_own(settings, capsys) -> None:
    assert study(settings | {"base_shots": [2]}) == 0
    assert "\nbase, 2-shot " in capsys.readouterr().out
    found = Results.read("runs/mine/results.json")
    names = ["upper.jsonl", "reverse.jsonl", "first.jsonl"]
    for model, shots in (("base", 0), ("base, 2-shot", 2)):
        data = TaskMixture(names, shots=shots)
        alone = evaluate("base", {"base": []}, data, max_new_tokens=3).where(model="base", metric="loss")
        for row in alone.rows:
            same = found.where(model=model, metric="loss", task=row["task"]).rows
            assert [other["value"] for other in same] == [pytest.approx(row["value"])]
    assert redone(settings | {"base_shots": [2, 4]}) == ["tests base 4-shot"]


def test_neither_a_training_nor_a_failed_one_stays_in_memory(settings) -> None:
    """The next piece of its process may need all of it."""
    settings["fit"] = {"trainer": {"callbacks": [{"class_path": "test_study.Watch"}]}}
    thresholds = gc.get_threshold()
    gc.set_threshold(0)  # which no command sets back, as it does `gc.disable`
    try:
        assert study(settings, "--only", "experts") == 1
    finally:
        gc.set_threshold(*thresholds)
    assert len(Watch.trained) == 2
    assert not any(one() for one in Watch.trained)


def test_a_task_of_conversations_on_a_base_without_a_template_is_refused_before_anything_runs(settings, capsys) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    write_rows(Path("talk.jsonl"), 8 * [{"messages": turns}])
    settings["tasks"]["held_out"].append("talk.jsonl")
    assert study(settings) == 1
    sentence = "the rows of talk are conversations, and the tokenizer of base has no chat template; take a base"
    assert sentence in capsys.readouterr().err
    assert not Path("runs/mine/library").exists()
    settings["tasks"]["held_out"] = []
    assert study(settings | {"data": {"chat_template": True}}) == 1
    assert "data.chat_template is set, but the tokenizer of base has no chat template" in capsys.readouterr().err


def test_a_study_trains_merges_and_tests(settings, capsys, monkeypatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda place: opened.append(place) or True)
    settings |= {"counts": ["all"], "experts": {"lora": LORA, "sparse": SPARSE}}
    settings |= {"multitask": {"kind": "lora", "steps": 3, "batch_size": 2}}
    assert study(settings, "--open") == 0
    assert opened == [Path("runs/mine/report.html").absolute().as_uri()]
    shown = capsys.readouterr().out
    assert "lora, single" in shown
    assert re.search(r"^  SparseAverage +2( +[\d.]+){2,4} *$", shown, re.MULTILINE)
    experts = {f"{kind}-{task}" for kind in ("lora", "sparse") for task in ("upper", "reverse")}
    merges = {"merge-lora-SparseAverage", "merge-sparse-SparseAverage"}
    assert set(Library("runs/mine/library")) == experts | merges | {"multitask"}
    found = results()
    tested = {"base", "multitask", "lora SparseAverage", "sparse SparseAverage"}
    assert {row["model"] for row in found.where(role="held_out").rows} == tested
    assert found.where(model="lora-upper").values("task") == ["upper"]
    page = Path("runs/mine/report.html").read_text()
    assert "lora SparseAverage" in page
    assert "https://" not in page
    assert "src=" not in page
    held = json.loads(gzip.decompress(base64.b64decode(re.search(r'application/gzip;base64,([^"]+)', page)[1])))
    assert held == json.loads(Path("runs/mine/results.json").read_text())
    joint = {"kind": "LoRAExpert", "steps": 3, "rows": 6, "tasks": ["reverse", "upper"]}
    assert settings_of("multitask") == joint, "the multitask expert has settings of its own"
    assert settings_of("lora-upper")["steps"] == LORA["steps"]
    # It takes longest, so no process begins it last.
    assert next(name for name in names(lines()) if name.startswith("experts")) == "experts multitask all 0"


def settings_of(name: str) -> dict[str, Any]:
    record = open_expert(f"runs/mine/library/{name}").record
    taken = {"steps": record["hyperparameters"]["steps"], "rows": record["training"]["rows"]}
    return {"kind": record["kind"], "tasks": record["tasks"]} | taken


def test_an_expert_and_its_scores_are_those_of_fit_and_evaluate(settings, monkeypatch) -> None:
    Path("lora.yaml").write_text(yaml.safe_dump(LORA) + "learning_rate: 1e-2\n")
    monkeypatch.setenv("HOME", str(Path.cwd()))
    tasks = {"held_in": ["~/upper.jsonl", {"path": "~/reverse.jsonl"}]}
    assert study(settings | {"merges": [], "experts": {"lora": "~/lora.yaml"}, "tasks": tasks}) == 0
    words = ["--base", "base", "--tasks", "upper.jsonl", "--out", "alone/lora-upper"]
    assert main(["fit", "--config", "lora.yaml", *words]) == 0
    mine, theirs = open_expert("runs/mine/library/lora-upper"), open_expert("alone/lora-upper")
    assert mine.content_hash == theirs.content_hash
    words = ["--experts", "alone/lora-upper", "--tasks", "upper.jsonl", "--max_new_tokens", "3", "--out", "runs/alone"]
    assert main(["evaluate", *words]) == 0
    alone = Results.read("runs/alone/results.json").where(model="lora-upper")
    for row in results().where(model="lora-upper").rows:
        assert row["value"] == alone.mean(row["metric"])


def test_the_data_type_holds_for_trainings_and_tests_and_a_kind_may_set_its_own(settings) -> None:
    settings |= {"experts": {"lora": LORA, "own": LORA | {"model": {"dtype": "float64"}}}, "merges": []}
    settings["tasks"] = {"held_in": ["upper.jsonl"], "held_out": ["first.jsonl"]}
    assert study(settings | {"dtype": "bfloat16"}) == 0
    made = Library("runs/mine/library")
    trained = {name: made[f"{name}-upper"].record["hyperparameters"]["dtype"] for name in ("lora", "own")}
    assert trained == {"lora": "bfloat16", "own": "float64"}
    # In bfloat16 a loss depends on the rows beside it.
    words = ["--base", "base", "--tasks", "upper.jsonl", "--held_out", "first.jsonl"]
    assert main(["evaluate", *words, "--max_new_tokens", "3", "--dtype", "bfloat16", "--out", "runs/alone"]) == 0
    alone = Results.read("runs/alone/results.json").mean("loss")
    assert results().where(model="base").mean("loss") == alone
    before = sorted(names(lines()))
    assert redone(settings) == before, "what was done in one data type was taken for another"
    assert results().where(model="base").mean("loss") != alone


def test_nothing_is_done_twice_and_a_change_redoes_only_what_depends_on_it(settings) -> None:
    settings |= {"experts": {"lora": LORA, "sparse": SPARSE}}
    assert study(settings) == 0
    assert redone(settings) == []
    settings["experts"]["sparse"] = SPARSE | {"steps": 2}
    assert redone(settings) == [
        "experts sparse reverse 0",
        "experts sparse upper 0",
        "merges sparse SparseAverage 2 0 0",
        "tests sparse reverse 0",
        "tests sparse upper 0",
    ]
    settings["merges"] = ["SparseAverage", "TIES"]
    assert redone(settings) == ["merges lora TIES 2 0 0", "merges sparse TIES 2 0 0"]
    rows = [json.loads(line) for line in Path("upper.jsonl").read_text().splitlines()]
    write_rows(Path("upper.jsonl"), [row for row in rows if row["split"] != "test"] + [rows[3]])
    assert redone(settings, "--only", "experts") == ["experts lora upper 0", "experts sparse upper 0"]
    # A metric in the place of Rouge-L redoes the tests alone.
    Path("lengths.py").write_text("def longer(generated, target):\n    return float(len(generated) + 7)\n")
    settings["experts"].pop("sparse")
    again = redone(settings | {"metrics": {"rougeL": "lengths.longer"}})
    assert {name.split()[0] for name in again} == {"tests", "merges"}
    assert all(row["value"] >= 7 for row in results().where(metric="rougeL").rows)


MINE = """
from dataclasses import dataclass
from modular_experts.experts import LoRAExpert
from modular_experts.methods import Average

class Own(LoRAExpert):
    pass

@dataclass(frozen=True)
class Mine(Average):
    pass
"""


def test_changed_code_of_ones_own_and_a_changed_base_redo_what_depends_on_them(settings, one_block, monkeypatch):
    monkeypatch.syspath_prepend(".")
    Path("methods_of_mine.py").write_text(MINE)
    Path("experts_of_mine.py").write_text(MINE)
    Path("metric_of_mine.py").write_text("def length(generated, target):\n    return float(len(generated))\n")
    Path("base").unlink()
    shutil.copytree(one_block, "base")
    settings["experts"]["own"] = LORA | {"expert": "experts_of_mine.Own"}
    settings |= {"merges": ["SparseAverage", "methods_of_mine.Mine"], "metrics": {"n": "metric_of_mine.length"}}

    known = set()

    def changed() -> set[str]:
        keys = {piece.key for piece in pieces_of(read_study(**settings), Path("runs/mine"))} - known
        known.update(keys)
        return {title_of(key) for key in keys}

    every = changed()
    assert changed() == set()
    Path("methods_of_mine.py").write_text(f"{MINE}\n# Another line.\n")
    assert changed() == {"merges lora Mine 2 0 0", "merges own Mine 2 0 0"}
    Path("experts_of_mine.py").write_text(f"{MINE}\n# Another line.\n")
    assert changed() == {one for one in every if " own" in one}
    Path("metric_of_mine.py").write_text("def length(generated, target):\n    return 2.0 * len(generated)\n")
    assert changed() == {one for one in every if one.startswith(("tests", "merges"))}
    for file, change in (("config.json", {"rms_norm_eps": 0.5}), ("tokenizer_config.json", {"note": "mine"})):
        content = json.loads(Path("base", file).read_text())
        Path("base", file).write_text(json.dumps(content | change))
        assert changed() == every


def test_a_process_that_has_loaded_a_base_reads_it_again_when_its_files_change(settings, one_block) -> None:
    Path("base").unlink()
    shutil.copytree(one_block, "base")
    settings |= {"tasks": ["upper.jsonl"], "merges": []}
    assert study(settings) == 0
    config, tokenizer = (json.loads(Path("base", name).read_text()) for name in ("config.json", "tokenizer.json"))
    words = tokenizer["model"]["vocab"]
    words["u"], words["p"] = words["p"], words["u"]
    for file, content in (("config.json", config | {"rms_norm_eps": 0.5}), ("tokenizer.json", tokenizer)):
        Path("base", file).write_text(json.dumps(content))
        assert study(settings) == 0
        alone = evaluate("base", {"base": []}, ["upper.jsonl"], max_new_tokens=3)
        assert results().where(model="base").mean("loss") == alone.mean("loss")


def test_settings_that_come_back_take_what_a_merge_needs_of_their_own_experts(settings) -> None:
    merges = ["RegMean", {"route": "Energy"}, {"shrink": "int4", "name": "small"}, {"route": "Oracle", "of": "small"}]
    settings |= {"merges": merges, "tasks": ["upper.jsonl", "reverse.jsonl"]}
    settings["experts"] = {"lora": LORA | {"learning_rate": 0.05}}
    other = settings | {"experts": {"lora": LORA | {"learning_rate": 0.05, "steps": 4}}}
    other["merges"] = [*merges[:2], {"shrink": "sign", "name": "small"}]
    assert study(settings, "--only", "merges") == 0
    first = numbers()
    assert study(other, "--only", "merges") == 0
    assert redone(settings, "--only", "merges") == [
        "experts lora reverse 0",
        "experts lora upper 0",
        "merges lora Energy 2 0 0",
        "merges lora Oracle of small 2 0 0",
        "merges lora RegMean 2 0 0",
        "merges lora small 2 0 0",
        "statistics lora gram 0",
    ]
    assert numbers() == first, "small experts of the other settings were routed"
    library = Library("runs/mine/library")
    made = {name: library[name].content_hash for name in ("lora-upper", "lora-reverse")}
    for name in ("merge-lora-RegMean", "route-lora-Energy"):
        assert {one["name"]: one["content_hash"] for one in library[name].record["parents"]} == made
    assert open_statistics(library["lora-upper"], "gram").facts["expert"] == made["lora-upper"]


def test_a_piece_that_failed_is_tried_again_when_what_it_needs_is_redone(settings) -> None:
    settings |= {"merges": ["RegMean"]}
    assert study(settings, "--only", "statistics") == 0
    shutil.rmtree("runs/mine/library/lora-upper/statistics")
    # As if the statistics had gone between them and the merge.
    line = lines()[-1]
    key = next(piece.key for piece in pieces_of(read_study(**settings), Path("runs/mine")) if piece.key[0] == "merges")
    failure = {"key": key, "result": {"failed": "lora-upper has no gram statistics", "trace": ""}}
    with Path("runs/mine", PIECES).open("a") as file:
        file.write(json.dumps(failure) + "\n")
    assert redone(settings, "--only", "merges") == ["merges lora RegMean 2 0 0", *names([line])]


def test_an_expert_that_comes_out_otherwise_redoes_what_was_made_of_it(settings, monkeypatch) -> None:
    """As on a GPU, where the same training ends in other last digits."""
    settings["tasks"] = {"held_in": ["upper.jsonl", "reverse.jsonl", "third.jsonl", "first.jsonl"]}
    tuned = {"method": "TaskArithmetic", "tune": {"grid": {"scale": [0.5, 1.0]}}, "rows": 2, "name": "tuned"}
    settings |= {"counts": [2, "all"], "merges": ["SparseAverage", tuned]}
    assert study(settings) == 0
    shutil.rmtree("runs/mine/library/lora-upper")
    trained = work.training_settings
    monkeypatch.setattr(work, "training_settings", lambda *given: [*trained(*given), {"seed_everything": 7}])
    made = ["experts lora upper 0", "tests lora upper 0", "settings lora tuned 2 0", "settings lora tuned 4 0"]
    number = next(row["group"] for row in results().rows if row["count"] == 2 and "lora-upper" in row["experts"])
    made += [f"merges lora SparseAverage 2 {number} 0", "merges lora SparseAverage 4 0 0"]
    # Both groups of two experts share the settings that were tuned.
    made += [f"merges lora tuned {which} 0" for which in ("2 0", "2 1", "4 0")]
    assert redone(settings) == sorted(made)
    library = Library("runs/mine/library")
    parents = {one["name"]: one["content_hash"] for one in library["merge-lora-SparseAverage"].record["parents"]}
    assert parents["lora-upper"] == library["lora-upper"].content_hash
    assert redone(settings) == []


def test_a_failing_piece_fails_alone_and_is_tried_again_with_retry(settings, capsys) -> None:
    good = Path("reverse.jsonl").read_text()
    Path("reverse.jsonl").write_text(good + '{"input": "no target"}\n')
    assert study(settings) == 1
    shown = capsys.readouterr()
    assert "failed: tests base, experts lora reverse 0: 1 bad row" in shown.out
    assert "left out because of that: 2 pieces\n" in shown.out
    assert "4 of 6 pieces have no result, 2 failed, 2 need a failed one; " in shown.err
    assert re.search(r"^2 of 6 pieces done, 2 failed, 2 need a failed one$", shown.err, re.MULTILINE)
    assert set(Library("runs/mine/library")) == {"lora-upper"}
    before = len(lines())
    assert study(settings) == 1
    assert len(lines()) == before, "what failed ran again without --retry"
    first, *_ = capsys.readouterr().err.splitlines()
    assert first == "4 pieces failed or need one that failed in an earlier run; --retry tries again"
    assert study(settings, "--status") == 0
    shown = capsys.readouterr().out
    assert "experts     1 of 2 done, 1 failed\nmerges      0 of 1 done, 1 need a failed one\n" in shown
    assert "\n0 pieces left\n" in shown
    assert "the study leaves these out until it gets --retry" in shown
    assert study(settings, "--dry-run", "--retry") == 0
    assert re.search("^4 pieces left, more than .* on one process$", capsys.readouterr().out, re.MULTILINE)
    assert study(settings, "--retry") == 1
    assert len(lines()) > before
    Path("reverse.jsonl").write_text(good)
    assert study(settings) == 0


def test_dry_run_and_status_write_nothing(settings, capsys) -> None:
    assert study(settings, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "to do   experts lora upper 0\n" in shown
    assert "6 pieces left\nthe time of 6 of them is not known, because nothing like them is done yet" in shown
    assert study(settings, "--status") == 0
    assert "the time of 6 of them is not known, because nothing like them is done yet" in capsys.readouterr().out
    assert not Path("runs").exists()
    assert study(settings, "--only", "experts") == 0
    assert study(settings, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "done    experts lora upper 0\n" in shown
    Path("upper.jsonl").write_text(Path("upper.jsonl").read_text() + '{"input": "a", "target": "A", "split": "test"}\n')
    assert study(settings, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert re.search(r"^5 pieces left, more than .* left on one process$", shown, re.MULTILINE)
    assert study(settings | {"experts": {"lora": LORA | {"steps": 2}}}, "--status") == 0
    assert "experts     0 of 2 done" in capsys.readouterr().out


def test_random_groups_are_merged_tested_and_averaged(settings) -> None:
    settings["tasks"] = {"held_in": ["upper.jsonl", "reverse.jsonl", "third.jsonl"]}
    settings["merges"] = [{"method": "TIES", "tune": {"grid": {"scale": [0.5, 2.0]}}}]
    assert study(settings | {"counts": [{2: "2 draws"}, "all"]}) == 0
    pairs = [line["result"] for line in lines() if line["key"][:4] == ["merges", "lora", "TIES tuned", 2]]
    assert len({tuple(found["own"]) for found in pairs}) == 2
    (chosen,) = (line["result"] for line in lines() if line["key"][:4] == ["settings", "lora", "TIES tuned", 2])
    assert [found["settings"] for found in pairs] == [chosen["settings"]] * 2
    mean = sum(sum(found["scores"]["tasks"][task]["loss"] for task in found["own"]) / 2 for found in pairs) / 2
    (row,) = results().where(metric="mean_over_draws", of="loss").rows
    assert (row["count"], row["draws"], row["value"]) == (2, 2, pytest.approx(mean))
    assert row["interval"][0] <= mean <= row["interval"][1]
    assert "Means over random groups of 2 experts" in Path("runs/mine/report.html").read_text()
    # More draws add to those that are there, and `all` in a mapping is the group that the list has.
    assert redone(settings | {"counts": {2: 3, "all": 1}}, "--only", "merges") == [
        "merges lora TIES tuned 2 0 0",
        "merges lora TIES tuned 2 1 0",
        "merges lora TIES tuned 2 2 0",
        "settings lora TIES tuned 2 0",
    ]


def test_the_groups_of_a_count_share_the_settings_of_the_lowest_mean_loss_over_their_tasks(settings) -> None:
    settings["tasks"] = {"held_in": ["upper.jsonl", "reverse.jsonl", "third.jsonl", "fourth.jsonl"]}
    scales = [0.5, 1.0, 2.0]
    merge = {"method": "TIES", "tune": {"grid": {"scale": scales}}}
    assert study(settings | {"merges": [merge], "counts": [2, "all"]}) == 0
    chosen = {line["key"][3]: line["result"] for line in lines() if line["key"][0] == "settings"}
    merged = [line["result"] for line in lines() if line["key"][0] == "merges"]
    assert all(found["settings"] == chosen[found["count"]]["settings"] for found in merged)
    assert {found["count"] for found in merged} == {*chosen}
    pairs = [found for found in merged if found["count"] == 2]
    by_scale: list[list[float]] = [[] for _ in scales]
    for found in pairs:
        data = work.ChoiceRows([work.Task(path=f"{task}.jsonl") for task in found["own"]], eval_batch_size=16)
        experts = [f"runs/mine/library/{name}" for name in found["experts"]]
        alone = tune(experts, TIES(), data, grid={"scale": scales})
        for losses, trial in zip(by_scale, alone.trials, strict=True):
            losses.append(trial.loss)
    assert len(pairs) == 2
    assert [trial["loss"] for trial in chosen[2]["trials"]] == pytest.approx([sum(one) / 2 for one in by_scale])
    assert chosen[2]["settings"] == {"scale": min(chosen[2]["trials"], key=lambda trial: trial["loss"])["scale"]}
    record = open_expert("runs/mine/library/merge-lora-TIES-tuned").record
    assert record["method"]["init_args"]["scale"] == chosen[4]["settings"]["scale"]
    assert record["hyperparameters"]["trials"] == 3


def test_an_entry_of_merges_may_be_for_some_kinds_alone(settings) -> None:
    settings |= {"experts": {"lora": LORA, "sparse": SPARSE}}
    settings |= {"merges": [{"method": "SparseAverage", "kinds": ["sparse"]}, "TIES"]}
    keys = [piece.key for piece in pieces_of(read_study(**settings), Path("runs/mine"))]
    assert read_study(**settings | {"merges": ["RegMeanPlusPlus"], "counts": [2, "all"]})
    wanted = {("sparse", "SparseAverage"), ("sparse", "TIES"), ("lora", "TIES")}
    assert {key[1:3] for key in keys if key[0] == "merges"} == wanted


def test_the_multitask_expert_may_have_a_type_of_its_own_and_each_seed_has_its_experts(settings) -> None:
    multitask = {"expert": "FullExpert", "modules": ["q_proj"], "steps": 1, "batch_size": 4}
    assert study(settings | {"multitask": multitask, "seeds": [0, 1]}, "--only", "experts") == 0
    joint = {"kind": "FullExpert", "steps": 1, "rows": 4, "tasks": ["reverse", "upper"]}
    assert settings_of("multitask-seed0") == settings_of("multitask-seed1") == joint
    hashes = {open_expert(f"runs/mine/library/{name}-seed{seed}").content_hash for name in EACH for seed in (0, 1)}
    assert len(hashes) == 6


def test_routes_and_ensembles_of_the_experts_are_tested_like_their_merges(settings) -> None:
    settings["tasks"]["held_in"] = ["upper.jsonl", "reverse.jsonl", "third.jsonl"]
    settings |= {"matrix": True, "counts": [2, "all"]}
    ways: list[Any] = ["SelfRegMean", {"route": "Oracle", "fallback": "SelfRegMean"}, {"route": "Centroid"}]
    settings["data"] = {"eval_limit": 2}
    assert study(settings | {"merges": [*ways, {"ensemble": "probabilities"}]}) == 0
    found = results()
    tested = {"SelfRegMean", "Oracle else SelfRegMean", "Centroid", "Ensemble of probabilities"}
    assert set(found.values("merge")) - {None} == tested
    loss = {(row["model"], row["task"]): row["value"] for row in found.where(metric="loss").rows}
    # A router that is always right gives each task its own expert, and the held-out one to the fallback.
    for model in ("lora Oracle else SelfRegMean", "lora Oracle else SelfRegMean of 2, group 0"):
        mine = next(line["result"] for line in lines() if line["result"].get("model") == model)
        for task in mine["own"]:
            assert loss[model, task] == pytest.approx(loss[f"lora-{task}", task], rel=1e-5)
    fallback = "lora SelfRegMean"
    assert loss["lora Oracle else SelfRegMean", "first"] == pytest.approx(loss[fallback, "first"], rel=1e-5)
    of_two = " of 2, group 0"
    assert loss[f"lora Oracle else SelfRegMean{of_two}", "first"] == pytest.approx(loss[fallback + of_two, "first"])
    library = Library("runs/mine/library")
    routes = {"route-lora-Centroid", "route-lora-Oracle-else-SelfRegMean"}
    assert {name for name in library if library[name].is_routed} == routes
    # Routers learn from twelve training rows and six of validation, whatever a test reads.
    assert open_statistics(library["lora-upper"], "prompts").facts["tasks"] == {"upper": 18}
    # By Jensen's inequality, the loss of the mean of probabilities is at most the mean of the members' losses.
    for task in ("upper", "reverse", "first"):
        alone = [loss[f"lora-{own}", task] for own in ("upper", "reverse", "third")]
        assert loss["lora Ensemble of probabilities", task] <= sum(alone) / 3 + 1e-6
    ways[0] = {"method": {"class_path": "SelfRegMean", "init_args": {"scale": 0.5}}}
    again = redone(settings | {"merges": [*ways, {"ensemble": "probabilities"}]})
    assert {line["key"][2] for line in lines()[-len(again) :]} == {"SelfRegMean", "Oracle else SelfRegMean"}
    # The one model of a process is the base again after every piece.
    model, fresh = work.loaded("base", "float32")[0], work.Base.open("base").load("float32")
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(model.parameters(), fresh.parameters(), strict=True))


def test_small_experts_are_tested_on_their_own_tasks_and_routed(settings) -> None:
    settings |= {"experts": {"lora": LORA | {"steps": 2}, "sparse": SPARSE | {"steps": 2}}}
    one = {"shrink": {"encoding": "int4", "rank": 1}, "kinds": ["lora"]}
    ways: list[Any] = ["SparseAverage", {"shrink": "int8"}, one, {"shrink": "auto", "bound": 5.0, "rows": 4}]
    ways += [{"method": "EMR", "per_task": True}, {"route": "Centroid", "of": "int8", "fallback": "SparseAverage"}]
    assert study(settings | {"merges": ways}) == 0
    found, library = results(), Library("runs/mine/library")
    small = library["int8-lora-upper"]
    assert (small.record["encoding"], library["rank-1-int4-lora-upper"].record["encoding"]) == ("int8", "int4")
    assert library["smallest-within-5-sparse-upper"].record["encoding"] == "sign"
    routed = library["route-lora-Centroid-of-int8-else-SparseAverage"]
    parents = [f"int8-lora-{task}" for task in ("upper", "reverse")] + ["merge-lora-SparseAverage"]
    assert [one["name"] for one in routed.record["parents"]] == parents
    alone = evaluate("base", {"int8": [small]}, ["upper.jsonl"], max_new_tokens=3).where(model="int8")
    tested = found.where(model="lora int8", task="upper")
    assert tested.mean("loss") == pytest.approx(alone.mean("loss"), rel=1e-6)
    assert found.where(model="lora int8").values("task") == ["upper", "reverse"]
    # One copy of the same weights in bfloat16 has 2 bytes an entry.
    copy = 2 * sum(shape.numel() for shape in small.shapes().values())
    both = [sum(library[f"int8-lora-{task}"].stored_bytes().values()) for task in ("upper", "reverse")]
    assert found.where(model="lora int8").mean("size") == pytest.approx(sum(both) / copy)
    exact = [sum(library[f"lora-{task}"].stored_bytes().values()) for task in ("upper", "reverse")]
    assert found.where(model="lora, single").mean("size") == pytest.approx(sum(exact) / copy)
    assert found.where(model="lora Centroid of int8 else SparseAverage").mean("size") > sum(both) / copy
    # EMR's masks have a bit for each entry of the weights of two tasks, beside their merge in bfloat16.
    merge = open_expert("runs/mine/library/merge-lora-EMR-by-task")
    shared = sum(size // 2 for size in merge.stored_bytes().values())
    masks = 2 * sum(-(-shape.numel() // 8) for shape in merge.shapes().values())
    assert found.where(model="lora EMR by task").mean("size") == pytest.approx((shared + masks) / copy)
    assert 0 < found.where(model="sparse EMR by task").mean("size") < found.where(model="sparse, single").mean("size")
    shutil.rmtree("runs/mine/library/int8-lora-upper")
    assert {name.split()[2] for name in redone(settings | {"merges": ways})} == {"int8"}


def test_what_chooses_settings_never_sees_test_rows_or_held_out_tasks(settings) -> None:
    """Other test rows and other held-out tasks give the same experts, settings, statistics and coefficients."""
    search = {"search": {"class_path": "ATLAS", "init_args": {"steps": 2}}, "merges": ["RegMean"]}
    settings |= {"merges": [{"method": "TIES", "tune": {"grid": {"keep": [0.2, 0.5]}}}, search, "Fisher"]}
    assert study(settings) == 0
    before = Path("runs/mine").rename("runs/before")
    for file in ("upper.jsonl", "reverse.jsonl", "first.jsonl"):
        rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
        for row in rows:
            if row["split"] == "test" or file == "first.jsonl":
                row["target"] = "zzz"
        write_rows(Path(file), rows)
    assert study(settings) == 0
    assert numbers() != numbers("runs/before"), "the change of the test rows changed no number"
    for name in Library("runs/mine/library"):
        found, known = (open_expert(f"{place}/library/{name}").content_hash for place in ("runs/mine", before))
        assert found == known, name
    with pytest.raises(ValueError, match="first is held out, and must not choose anything"):
        work.ChoiceRows([work.Task(path="first.jsonl", role="held_out")])
    for stage in ("test", "predict", None):
        with pytest.raises(ValueError, match=f"stage={stage!r} reads test rows, which must not choose"):
            work.ChoiceRows([work.Task(path="upper.jsonl")]).setup(stage)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tasks": {"held_in": "none/*.jsonl"}}, "no file matches 'none/*.jsonl'"),
        ({"tasks": {"held_in": ["upper.jsonl"], "held_out": ["upper.jsonl"]}}, "two tasks have the name 'upper'"),
        ({"experts": {"lora": {**LORA, "stps": 3}}}, "error: experts.lora: there is no option --stps"),
        ({"fit": {"stps": 3}}, "fit and experts.lora: there is no option --stps; did you mean --steps"),
        ({"experts": {"lora": {**LORA, "modules": "q_proj v_proj"}}}, "one pattern, 'q_proj v_proj', with a space"),
        ({"tasks": {"heldin": ["upper.jsonl"]}}, "tasks.heldin is neither held_in nor held_out; did you mean held_in"),
        ({"merges": ["SparseAverag"]}, "did you mean SparseAverage"),
        ({"measures": {"gain": "statistics.mean"}}, "measures.gain has a name that results have already"),
        ({"experts": {"lora": {"stored": "library", "steps": 5}}}, "as they are; leave out steps, or stored"),
        ({"metrics": {"mine": "nope.mine"}}, "--metrics.mine: nope.mine cannot be imported"),
        ({"merges": ["TIES", "TIES"]}, "two merges are called 'TIES'"),
        ({"merges": ["TIES", {"route": "Arrow", "fallback": "TIES"}]}, "Arrow rejects no input here, so the fallback"),
        ({"counts": [3]}, "counts holds 3; give numbers from 2 to the 2 held-in tasks"),
        ({"multitask": {"kind": "lra"}}, "kind 'lra', which is not among the experts; did you mean lora"),
        ({"data": {"eval_limt": 3}}, "data.eval_limt is not a setting of how the rows of a study"),
        ({"seeds": [0, 0]}, "seeds=[0, 0] must be one or more different numbers"),
        ({"merges": [{"shrink": "int5"}]}, " not as 'int5'"),
        ({"merges": [{"shrink": "int4", "bound": 0.1}]}, "bound is for {shrink: auto}, which chooses a form"),
        ({"merges": [{"shrink": "int4"}, {"route": "Centroid", "of": "int8"}]}, "of: 'int8' must be the name of a way"),
        ({"merges": [{"method": "TIES", "per_task": True}]}, "TIES gives tasks no experts of their own"),
        ({"merges": [{"method": "EMR", "per_task": True, "tune": True}]}, "tune is not for an expert of each task"),
    ],
)
def test_bad_settings_are_refused_in_a_sentence_before_anything_runs(settings, capsys, change, sentence) -> None:
    assert study(settings | change, "--status") in (1, 2)
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
    assert not Path("runs").exists()


def test_two_studies_in_one_folder_and_a_folder_of_other_things_are_refused(settings, capsys) -> None:
    Path("runs/mine").mkdir(parents=True)
    with locked(Path("runs/mine"), Path("runs/mine")):
        assert study(settings) == 1
    assert "is being written by another process; wait for it, or choose another place" in capsys.readouterr().err
    Path("runs/mine/thesis.txt").write_text("")
    assert study(settings) == 1
    assert "holds other things than a study" in capsys.readouterr().err


def test_what_a_killed_run_left_half_written_is_removed_by_the_next(settings) -> None:
    assert study(settings, "--only", "experts") == 0
    library = Path("runs/mine/library")
    folders = [library / ".lora-upper.0123abcd", library / ".merge-lora-TIES.k3_x9a0b"]
    statistics = library / "lora-upper" / "statistics" / ".gram.safetensors.0123abcd.data"
    files = [folders[0] / "delta.safetensors.data", statistics, Path("runs/mine/.results.json.0123abcd")]
    for place in [*folders, statistics.parent]:
        place.mkdir()
    for file in files:
        file.write_bytes(b"half")
    # A merge goes on with the folder that its key names, and another process may be writing an expert of its own.
    kept, held = library / ".merge-lora-TIES.0123456789abcdef", library / ".mine.0123abcd"
    kept.mkdir()
    held.mkdir()
    with locked(held, held):
        assert study(settings, "--only", "experts") == 0
    assert not [place for place in [*folders, *files] if place.exists()]
    assert kept.exists()
    assert held.exists()


def test_a_full_disk_loses_nothing_and_leaves_nothing_half_made(settings, tiny_llama_dir, capsys) -> None:
    """The limit on a file's size lets a line and an expert be written in part, as a disk does that is full."""
    settings |= {"base": str(tiny_llama_dir), "merges": []}
    assert study(settings) == 0
    known, limits = numbers(), resource.getrlimit(resource.RLIMIT_FSIZE)
    shutil.rmtree("runs/mine")
    capsys.readouterr()

    def told(limit: int) -> Any:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            assert study(settings) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        return capsys.readouterr()

    assert "no result could be stored (File too large)" in told(1_000).err
    # An expert has 16 kB, the lines with two errors and the frames that led to them some 12.
    assert "failed: experts lora upper 0: " in told(15_500).out
    assert study(settings, "--status") == 0
    status = capsys.readouterr().out
    for task in ("upper", "reverse"):
        assert re.search(rf"^failed: experts lora {task} 0: .*File too large: '.*-{task}'$", status, re.MULTILINE)
    assert not [*Path("runs/mine").glob("library/*")]
    assert study(settings, "--retry") == 0
    assert numbers() == known
    capsys.readouterr()
    assert re.search(r"^error: .*File too large: '.*report.html'$", told(12_000).err, re.MULTILINE)
