"""`combine` on four tasks that no other test knows: what it measures, what it chooses, and where it goes on."""

import json
import random
import shutil
import string
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import build_model, build_tokenizer, write_rows

from modular_experts import Distilled, TaskMixture, combine, distill, evaluate, fit, open_expert
from modular_experts.data import Inputs
from modular_experts.experts import LoRAExpert
from modular_experts.experts.expert import ExpertFactory
from modular_experts.library import open_statistics
from modular_experts.merging.combine import MEASURED
from modular_experts.merging.objective import ValidationRows
from modular_experts.merging.statistics import take_statistics
from modular_experts.study.parser import make

NAMES = [f"code{number}" for number in range(4)]
FEW = Distilled(steps=10, batch=4, rows=24, learning_rate=0.05, max_new_tokens=3)
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, four files of tasks whose rows begin with a sign of the task, and an expert for each of them."""
    place, draw = tmp_path_factory.mktemp("four"), random.Random(7)
    model = build_model("llama", num_hidden_layers=1)
    with torch.no_grad():
        # A random model is sure of nothing unless it is made sharper.
        model.lm_head.weight.mul_(15)
    model.save_pretrained(place / "base")
    build_tokenizer().save_pretrained(place / "base")
    for sign, name in zip(string.ascii_uppercase, NAMES, strict=False):
        answers, rows = draw.sample("abcdefgh", 2), []
        for count in range(60):
            word = "".join(draw.choice("xyz") for _ in range(3)) + draw.choice("pq")
            split = ("train", "train", "validation", "test")[count % 4]
            rows.append({"input": f"{sign}{sign} {word}", "target": answers[word[-1] == "q"], "split": split})
        write_rows(place / f"{name}.jsonl", rows)
        how = {"steps": 40, "batch_size": 8, "learning_rate": 0.03, "keep_inputs": 24}
        how["trainer"] = QUIET | {"limit_val_batches": 0}
        fit(place / "base", place / f"{name}.jsonl", LoRAExpert, "all-linear", place / "library" / name, **how)
    return place


@pytest.fixture(scope="module")
def done(place):
    """What `combine` made from the library alone, measuring fewer rows for `shrink` than the other ways learn from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modular_experts.merging.combine.SHRINK_ROWS", 8)
        return combine([place / "library" / name for name in NAMES], place / "out", distilled=FEW)


def exact(place, way) -> float:
    """Return the exact match of a way on test rows, by another function than the one that chose."""
    results = evaluate(None, way.place, [place / f"{name}.jsonl" for name in NAMES], max_new_tokens=3)
    return results.mean("exact_match")


def test_the_better_choice_within_each_budget(place, done) -> None:
    merged, whole, small, distilled = done.ways
    assert (merged.name, distilled.name, merged.bytes, distilled.bytes) == ("IsoC", "Distilled", 0, 0)
    assert 0 < small.bytes < whole.bytes
    assert whole.bytes == sum(one.size_on_disk for one in map(open_expert, (place / "out/experts").iterdir()))
    assert done.best() is whole
    assert exact(place, whole) > max(0.2, exact(place, merged))
    for budget, fitting in ((small.bytes, [merged, small, distilled]), (small.bytes - 1, [merged, distilled])):
        assert done.best(budget) is max(fitting, key=lambda way: way.kept)


def test_one_expert_is_trained_where_it_is_asked_for(place, done, tmp_path, monkeypatch, caplog) -> None:
    shutil.copytree(place / "out", tmp_path / "out")
    experts = [place / "library" / name for name in NAMES]
    seen: list = []
    plans: list = []

    def progress(items):
        for item in items:
            seen.append(item)
            yield item

    how = {"distilled": FEW, "progress": progress, "planned": plans.append}
    made = combine(experts, tmp_path / "out", **how, into=partial(LoRAExpert, rank=4))
    names = [way.name for way in done.ways]
    assert [way.name for way in made.ways] == [*names, "LoRAExpert(rank=4) distilled"]
    (plan,) = plans
    assert [way.name for way in plan.ways] == ["LoRAExpert(rank=4) distilled"]
    assert seen == list(range(100))
    one = made.ways[-1]
    expert = open_expert(one.place)
    assert expert.record["hyperparameters"]["distilled"] == dict.fromkeys(NAMES, 18)
    assert expert.record["hyperparameters"]["rank"] == 4
    assert one.bytes == 0
    parsed = make("--into", ExpertFactory, {"class_path": "LoRAExpert", "init_args": {"rank": 4}})
    assert combine(experts, tmp_path / "out", **how, into=parsed).ways == made.ways, "as a command reads it"
    other = combine(experts, tmp_path / "out", **how, into=LoRAExpert)
    assert other.ways[-1].name == "LoRAExpert distilled"
    assert other.ways[-1].place != one.place
    assert "step" not in caplog.text


def test_distilled_learns_from_every_input_that_does_not_measure(place, done) -> None:
    experts = [open_expert(place / "library" / name) for name in NAMES]
    learned = Inputs.kept_by(experts).part(False)
    assert {len(prompts) for prompts in learned.prompts.values()} == {18}
    own = distill(experts, place / "own", FEW, learned).expert
    assert open_expert(done.ways[-1].place).content_hash == own.content_hash


def test_what_is_there_is_not_made_again(place, done, monkeypatch) -> None:
    def times():
        return {path: path.stat().st_mtime_ns for path in (place / "out").rglob("*.safetensors")}

    before, experts = times(), [place / "library" / name for name in NAMES]
    monkeypatch.setenv("HOME", str(place))
    assert combine(experts, "~/out", distilled=FEW) == done
    assert times() == before
    file = place / "out" / MEASURED
    known = json.loads(file.read_text())
    way = known["ways"].pop("Distilled")
    file.write_text(json.dumps(known))
    shutil.rmtree(place / "out/distilled")
    again = combine(experts, place / "out", distilled=FEW)
    assert {str(path.relative_to(place / "out")) for path, time in times().items() if before[path] != time} == {
        "distilled/delta.safetensors",
        "distilled-IsoC/delta.safetensors",
    }
    assert again.ways[-1].kept == way["kept"]
    with pytest.raises(FileExistsError, match="exists already"):
        combine(experts[:-1], place / "out", distilled=FEW)
    (place / "other").mkdir(exist_ok=True)
    with pytest.raises(FileExistsError, match="cannot be replaced"):
        combine(experts, place / "other", distilled=FEW, overwrite=True)


def test_one_progress_shows_the_whole_work_and_ways_come_as_they_are_measured(place) -> None:
    events: list[object] = []

    def shown(items):
        for item in items:
            events.append(item)
            yield item

    how = {"planned": events.append, "measured": lambda way: events.append(way.name), "progress": shown}
    experts = [place / "library" / name for name in NAMES[:2]]
    done = combine(experts, place / "shown", distilled=FEW, **how)
    plan, *rest = events
    names = [way.name for way in done.ways]
    assert [way.name for way in plan.ways] == names
    assert plan.seconds == pytest.approx(plan.before + sum(way.seconds for way in plan.ways))
    assert [event for event in rest if isinstance(event, int)] == list(range(100))
    assert [event for event in rest if isinstance(event, str)] == names
    # Each way is shown before work goes on with the next one.
    assert 0 < rest.index(names[0]) < rest.index(names[1]) < rest.index(names[2]) < rest.index(names[3])
    events.clear()
    combine(experts, place / "shown", distilled=FEW, **how)
    assert events == names


def test_experts_of_one_name_are_refused_before_anything_is_made(place) -> None:
    one, other = place / "library/code0", place / "beside/code0"
    for name, target in (("code0", other), ("routed", place / "beside/routed")):
        shutil.copytree(place / "library/code1", target)
        with pytest.raises(ValueError, match=f"two experts would be called {name}"):
            combine([one, target], place / "twice", distilled=FEW)
    assert not (place / "twice").exists()


def test_an_expert_without_its_task_is_refused_before_anything_is_made(place) -> None:
    data, experts = TaskMixture([place / "code0.jsonl"]), [place / "library" / name for name in NAMES[:2]]
    with pytest.raises(ValueError, match="code1 was trained on code1, and the data has code0; add its task"):
        combine(experts, place / "lacking", data, distilled=FEW)
    assert not (place / "lacking").exists()


def test_rows_measure_and_held_out_tasks_are_tested(place, run, monkeypatch) -> None:
    monkeypatch.chdir(place)
    tasks = [{"path": f"{name}.jsonl", "role": "held_in" if name in NAMES[:2] else "held_out"} for name in NAMES]
    tasks[-1]["where"] = {"target": json.loads(Path("code3.jsonl").read_text().splitlines()[0])["target"]}
    shutil.copytree("library", "taken")
    both = ["taken/code0", "taken/code1"]
    take_statistics(both, "prompt_parts", ValidationRows(TaskMixture(tasks), rows=256))
    how = ["--experts", *both, "--tasks", json.dumps(tasks), "--out", "rows"]
    code, out, _ = run("combine", *how, "--distilled", "Distilled", "--budget", "1kB")
    assert code == 0
    way = json.loads((place / "rows" / MEASURED).read_text())["ways"]["Distilled"]
    # The router learns from inputs of training rows, and not of the 15 of validation, which measure.
    for library in ("experts", "small"):
        statistics = open_statistics(open_expert(f"rows/{library}/code0"), "prompt_parts")
        assert statistics.facts["tasks"] == {"code0": 30}
    own = evaluate(None, "rows/distilled", TaskMixture(tasks), max_new_tokens=3)
    assert way["held_out"] == pytest.approx(own.mean("exact_match", role="held_out"))
    assert "held out" in out
    assert "\nbest within 1kB: " in out
    assert "next: modular-experts apply rows/distilled --out checkpoint" in out
    code, _, err = run("combine", *how, "--distilled", "Distilled", "--max_length", 99)
    assert (code, "exists already" in err) == (1, True)
    rows = [json.loads(line) for line in Path("code0.jsonl").read_text().splitlines()]
    exchanged = [row | {"split": other["split"]} for row, other in zip(rows[1:3], rows[2:0:-1], strict=True)]
    write_rows(Path("code0.jsonl"), [rows[0], *exchanged, *rows[3:]])
    code, _, err = run("combine", *how, "--distilled", "Distilled")
    assert (code, "exists already" in err) == (1, True)
    write_rows(Path("code0.jsonl"), rows)
    with open("code2.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"input": "CC xyzp", "target": "a", "split": "test"}) + "\n")
    code, _, err = run("combine", *how, "--distilled", "Distilled")
    assert (code, "exists already" in err) == (1, True)
