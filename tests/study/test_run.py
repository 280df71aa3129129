"""A small run makes all that the plan names, and a run that lost some of it ends with the same numbers."""

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from testbed.here import Here

from modular_experts.base import Base
from modular_experts.cli.study import UnfinishedStudyError, check_finished
from modular_experts.data.suite import HELD_IN, HELD_OUT
from modular_experts.library import Library, open_expert
from modular_experts.reports import Results
from modular_experts.reports.page import Section
from modular_experts.reports.tables import element
from modular_experts.study import results_of
from modular_experts.study.quickstart import FACTS, Sizes, description, run_quickstart, small_base
from modular_experts.study.report import figure_of, write_report
from modular_experts.study.run import State
from modular_experts.study.summary import labelled

SIZES = Sizes(width=16, rows=4, target=2.0, limit=4, decay=2, validation=1, test=1)
"""The base never meets its target, and stops at its limit."""
KINDS = ("sparse", "lora")


def small(seed: int = 0) -> dict[str, Any]:
    """Return the study of a quickstart with few tasks, kinds and rows."""
    study = description(seed, tasks=2)
    study["fit"]["steps"] = 1
    study["experts"] = {kind: study["experts"][kind] for kind in KINDS}
    for merge in study["merges"]:
        merge["kinds"] = [kind for kind in merge.get("kinds", KINDS) if kind in KINDS]
    for task in [*study["tasks"]["held_in"], *study["tasks"]["held_out"]]:
        task["source"]["init_args"] |= {"train": 16, "validation": 1, "test": 1}
    return study


SMALL = small()
EXPERTS = [f"{kind}-{task['name']}" for kind in KINDS for task in SMALL["tasks"]["held_in"]]
SCALES = {merge["name"]: merge["tune"]["grid"]["scale"] for merge in SMALL["merges"] if "tune" in merge}
MERGES = [(kind, merge["name"]) for kind in KINDS for merge in SMALL["merges"] if kind in merge["kinds"]]
OF_ALL = [method for method in SCALES if method != "SparseAverage"]


class WithoutDevices(Here):
    def __init__(self, devices: list[str]) -> None:
        super().__init__()
        assert {*devices} == {""}, "a GPU would give other numbers"


@pytest.fixture(scope="module", autouse=True)
def _no_processes() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modular_experts.study.quickstart.LocalProcesses", WithoutDevices)
        yield


Made = tuple[Path, Results, State]


def made(out: Path, progress: Callable[..., None] = lambda *shown: None) -> Made:
    study, state = run_quickstart(SMALL, out, SIZES, progress)
    return out, results_of(study, state), state


def numbers(results: Results) -> list[Any]:
    """Return the rows of results in one order, whatever was finished first."""
    return sorted(json.dumps(row, sort_keys=True) for row in results.rows)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Made:
    out = tmp_path_factory.mktemp("quickstart")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["modular-experts"])
        return made(out)


def test_the_directory_holds_a_base_a_library_and_all_results(finished) -> None:
    out, results, state = finished
    assert not state.failed
    merges = [f"merge-{kind}-{name.replace(' ', '-')}" for kind, name in MERGES]
    assert sorted(Library(out / "library")) == sorted([*EXPERTS, *merges, "multitask"])
    assert Base.open(out / "base").load().config.hidden_size == 16
    there = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    assert there == ["base", "library", "pieces.jsonl", "runs"]
    for kind, name in MERGES:
        if name in SCALES:
            chosen = open_expert(out / "library" / f"merge-{kind}-{name}")
            assert chosen.record["method"]["init_args"]["scale"] in SCALES[name]
            assert chosen.record["hyperparameters"]["trials"] == len(SCALES[name])
        assert results.mean("exact_match", kind=kind, merge=name, count=2, role="held_out") is not None
    facts = json.loads((out / "base" / FACTS).read_text())
    assert {"parameters", "steps", "target_reached", "latent", "settings"} <= set(facts)
    assert set(facts["latent"]["held_in"]) == {"exact_match", "rougeL", "loss"}


def test_the_figure_has_a_line_for_each_method_and_the_page_all_sections(finished, tmp_path) -> None:
    results = finished[1]
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", figure_of(labelled(results)))
    names = [text for text in texts if text in SCALES or text.endswith(", single")]
    assert names == ["sparse, single", *SCALES, "lora, single", *OF_ALL]
    write_report(results, tmp_path / "report.html", [element("p", "A base.")], [Section("Try next", "Go on", [])])
    page = (tmp_path / "report.html").read_text()
    named = re.findall(r'<section id="([^"]*)">', page)
    assert {"overview", "gains-and-losses", "every-task", "answers", "costs", "try-next"} <= {*named}
    assert "A base." in page
    used = set(re.findall(r"var\((--\w+)", page)) - {"--share", "--heat"}
    style = page[page.index("<style>") : page.index("</style>")]
    assert used
    assert all(style.count(f"{name}:") == 2 for name in used), "a colour is not given in light and dark"


def test_the_tokenizer_spells_any_text_and_knows_each_word_of_the_suite(finished) -> None:
    tokenizer = Base.open(finished[0] / "base").tokenizer()
    assert tokenizer.decode(tokenizer("Größe 42 €\n")["input_ids"]) == "Größe 42 €\n"
    assert len(tokenizer(" reverse c a b = b a c")["input_ids"]) == 8


def test_a_run_that_lost_results_or_experts_makes_only_these_again_with_the_same_numbers(finished, tmp_path) -> None:
    """A result counts only with its expert in the library."""
    copy = tmp_path / "copy"
    shutil.copytree(finished[0], copy)
    shutil.rmtree(copy / "library" / "sparse-reverse")
    lines = (copy / "pieces.jsonl").read_text().splitlines(keepends=True)
    lost = ('["experts", "lora", "upper"', '["merges", "lora", "TIES", 2', '["tests", "base"')
    kept = [line for line in lines if not line.startswith(tuple('{"key": ' + key for key in lost))]
    assert len(kept) == len(lines) - len(lost)
    (copy / "pieces.jsonl").write_text("".join(kept))
    (copy / "base").rename(tmp_path / "base")  # the same base at another place
    (copy / "base").symlink_to(tmp_path / "base")
    shown = []
    again = made(copy, lambda state, left: shown.append(len(state.done)))
    assert numbers(again[1]) == numbers(finished[1])
    assert len((copy / "pieces.jsonl").read_text().splitlines()) == len(kept) + len(lost) + 1
    assert shown == sorted(shown)
    assert 0.5 < shown[0] / shown[-1] < 0.95  # most was there already
    assert shown[-1] == len(again[2].pieces)


def test_a_piece_that_fails_gets_a_sentence_and_is_tried_again(finished, tmp_path, monkeypatch) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished[0], copy)
    shutil.rmtree(copy / "library" / "sparse-reverse")

    def full(*given: Any, **named: Any) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("modular_experts.training.export_expert.write_expert", full)
        _, _, state = made(copy)
        failed = {key[:3]: one.sentence for key, one in state.failed.items() if one.needed is None}
        assert failed == {("experts", "sparse", "reverse"): "the disk is full"}
        with pytest.raises(UnfinishedStudyError, match="pieces have no result, 1 failed"):
            check_finished(state, copy)
    assert numbers(made(copy)[1]) == numbers(finished[1])


@pytest.mark.parametrize(("name", "text"), [("report.html", "mine"), ("results.json", "{")])
def test_a_directory_with_other_things_is_refused_and_left_alone(tmp_path, name: str, text: str) -> None:
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with pytest.raises(FileExistsError, match="holds other things than a study; give another `out=` to keep them"):
        run_quickstart(SMALL, tmp_path / "out", SIZES)
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [file]
    assert file.read_text() == text


def test_a_directory_of_another_plan_or_an_older_version_is_refused_and_left_alone(finished, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"holds a quickstart of other settings, such as another seed, or of"):
        run_quickstart(small(seed=1), finished[0], SIZES)
    file = tmp_path / "out" / "base" / FACTS
    shutil.copytree(finished[0] / "base", file.parent)
    facts = json.loads(file.read_text())
    del facts["settings"]
    file.write_text(json.dumps(facts))
    (tmp_path / "out" / "pieces.jsonl").touch()
    with pytest.raises(ValueError, match="or of an older version; give another `out=`"):
        run_quickstart(SMALL, tmp_path / "out", SIZES)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["base", "pieces.jsonl"]


def test_counts_end_with_all_tasks_and_the_first_ones_are_of_different_families() -> None:
    counts = [description(tasks=tasks)["counts"] for tasks in (2, 7, 20)]
    assert counts == [["all"], [2, 5, "all"], [2, 5, 10, "all"]]
    assert len({task.instruction.split()[0] for task in small_base(description(tasks=7)).held_in}) == 7


def test_the_tasks_of_the_file_are_those_of_the_suite_which_the_base_learns() -> None:
    for role, tasks in (("held_in", HELD_IN), ("held_out", HELD_OUT)):
        named = [(task["name"], task["source"]["class_path"]) for task in description()["tasks"][role]]
        assert named == [(task.name(), task.__name__) for task in tasks]


def test_the_expert_of_all_tasks_reads_as_many_rows_as_the_experts_of_a_kind_together() -> None:
    for tasks in (20, 8):
        study = description(tasks=tasks)
        rows = study["multitask"]["steps"] * study["multitask"]["batch_size"]
        assert rows == tasks * study["fit"]["steps"] * study["fit"]["batch_size"]


@pytest.mark.parametrize("tasks", [1, 21])
def test_too_few_or_too_many_tasks_get_a_sentence(tasks: int) -> None:
    with pytest.raises(ValueError, match=rf"tasks={tasks} must be from 2 to 20; a merge needs two experts"):
        description(tasks=tasks)
