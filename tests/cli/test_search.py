"""`merge --tune`, `search` and `shrink`: what they choose, write and say, and every mistake."""

import json
import shutil

import pytest
import torch
from testbed.runs import mixture
from testbed.searching import descent, objective_on, random_experts, stored

from modular_experts.base import Base
from modular_experts.base.apply import applied
from modular_experts.base.files import fingerprint
from modular_experts.evaluation import measure
from modular_experts.library import make_record, open_expert, write_expert

EXPERTS = ["--experts", "[library/0, library/1]"]


@pytest.fixture
def place(tiny_llama_dir, task_files, tmp_path, monkeypatch):
    """A directory to stand in, with an expert for each of two tasks, one further than is best."""
    monkeypatch.chdir(tmp_path)
    objective = objective_on(tiny_llama_dir, task_files)
    base = {"id": str(tiny_llama_dir), "revision": None, "fingerprint": fingerprint(tiny_llama_dir)}
    stored(tmp_path / "library", [descent(objective, "upper", 3.0), descent(objective, "reverse", 3.0)], base)
    return tmp_path


@pytest.fixture
def tasks(task_files) -> str:
    """The tasks as an option."""
    return json.dumps([{"name": name, "path": str(task_files[name])} for name in ("upper", "reverse")])


def validation_losses(base, task_files, expert) -> dict[str, float]:
    """Return the losses of stored experts on the base, measured on their own."""
    data = mixture({name: task_files[name] for name in ("upper", "reverse")}, base)
    data.setup("validate")
    model = Base.open(base).load()
    with applied(model, [expert]):
        found = measure(model, Base.open(base).tokenizer(), data.val_dataloader(), data.roles, max_new_tokens=None)
    return {name: scores["loss"] for name, scores in found["tasks"].items()}


def test_merge_with_tuning_chooses_writes_and_says_so(run, done, place, tasks, tiny_llama_dir, task_files):
    how = ["--method", "SparseAverage", "--tune", "--tasks", tasks, "--tune.grid.exponent", "[0, 1]"]
    out = done("merge", *EXPERTS, *how, "--out", "library/ab")
    merged, trials = open_expert("library/ab"), json.loads((place / "library/ab/trials.json").read_text())
    best = min(trials, key=lambda trial: trial["loss"])
    settings = merged.record["method"]["init_args"]
    assert {name: settings[name] for name in ("exponent", "scale")} == best["settings"]
    assert {trial["settings"]["exponent"] for trial in trials} == {0, 1}
    losses = validation_losses(tiny_llama_dir, task_files, merged)
    assert best["losses"] == pytest.approx(losses, rel=1e-5)
    scores = merged.record["scores"]
    assert scores == {"val_loss": best["loss"], **{f"val_loss/{name}": best["losses"][name] for name in losses}}
    notes = {"tuned": ["exponent", "scale"], "trials": len(trials), "rows": 64, "tuned_on": ["reverse", "upper"]}
    assert merged.record["hyperparameters"] == notes
    where = "validation rows of upper, reverse"
    assert f"chose the best of {len(trials)} settings on {where}: loss {best['loss']:.4f}" in out
    assert "all trials are in library/ab/trials.json" in out
    assert {file.name for file in (place / "library").iterdir()} == {"0", "1", "ab"}
    assert merged.size_on_disk == sum(file.stat().st_size for file in merged.path.iterdir() if file.stem != "trials")
    assert f"scale={best['settings']['scale']:.4g}"[:10] in out
    shown = run("show", "library/ab")[1]
    assert f"validation loss of upper: {best['losses']['upper']:.4g}" in shown
    assert "tuned_on=['reverse', 'upper']" in shown.replace("\n", " ").replace("  ", "")


def test_tuning_and_searching_need_no_more_words_than_the_tasks(run, done, place, tasks):
    (place / "tasks.yaml").write_text(f"tasks: {tasks}")
    out = done("merge", *EXPERTS, "--tune", "--config", "tasks.yaml", "--out", "library/tuned")
    assert "chose the best of " in out
    assert "merged 2 experts with SelfRegMean" in out
    assert run("search", *EXPERTS, "--tasks", tasks, "--out", "library/searched")[0] == 0
    record = open_expert("library/searched").record
    assert record["hyperparameters"]["search"] == "ATLAS"
    scores = record["scores"]
    assert run("search", *EXPERTS, "--tasks", tasks, "--dtype", "bfloat16", "--out", "library/narrow")[0] == 0
    narrow = open_expert("library/narrow").record["scores"]
    assert narrow == {name: pytest.approx(loss, rel=0.02) for name, loss in scores.items()}
    assert narrow != scores


def test_settings_of_the_method_inside_another_are_tuned(run, done, place, tasks):
    how = ["--method", "SVC", "--method.inner", "TIES", "--tune", "--tasks", tasks]
    grid = '{"inner.keep": [0.1, 0.9], "scale": [1]}'
    done("merge", *EXPERTS, *how, "--tune.grid", grid, "--out", "library/ab")
    trials = json.loads((place / "library/ab/trials.json").read_text())
    assert [trial["settings"] for trial in trials] == [{"inner.keep": keep, "scale": 1} for keep in (0.1, 0.9)]
    best = min(trials, key=lambda trial: trial["loss"])
    inner = open_expert("library/ab").record["method"]["init_args"]["inner"]
    assert inner["init_args"]["keep"] == best["settings"]["inner.keep"]
    code, _, err = run("merge", *EXPERTS, *how, "--tune.grid", '{"inner.kep": [0.1]}', "--out", "library/b")
    assert (code, "did you mean inner.keep?" in err) == (1, True)


@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [
        ("LoRAHub", {"steps": 12}),
        ("AdaMerging", {"steps": 5, "learning_rate": 0.1, "objective": "loss"}),
        ("ATLAS", {"steps": 5, "learning_rate": 0.1, "start": "[0.2]"}),
    ],
)
def test_search_lowers_the_loss(done, place, tasks, tiny_llama_dir, task_files, algorithm, settings):
    options = [item for name, value in settings.items() for item in (f"--algorithm.{name}", value)]
    how = ["--algorithm", algorithm, *options, "--tasks", tasks, "--out", "library/ab"]
    out = done("search", *EXPERTS, *how)
    merged = open_expert("library/ab")
    losses = validation_losses(tiny_llama_dir, task_files, merged)
    found = {name.partition("/")[2]: loss for name, loss in merged.record["scores"].items() if "/" in name}
    assert losses == pytest.approx(found, rel=1e-5)
    assert merged.record["hyperparameters"]["search"] == algorithm
    assert merged.record["hyperparameters"]["tuned_on"] == ["reverse", "upper"]
    before = sum(validation_losses(tiny_llama_dir, task_files, {}).values()) / 2
    assert merged.record["scores"]["val_loss"] < before
    assert f"validation loss {merged.record['scores']['val_loss']:.4f}, and {before:.4f} of the base alone" in out
    assert len(json.loads((place / "library/ab/trials.json").read_text())) == settings["steps"]
    assert bool(merged.record["per_weight"]) == (algorithm != "LoRAHub")


def test_only_the_same_search_by_row_makes_its_merge_again(run, done, place, tasks, tiny_llama_dir, task_files):
    how = ["--merges", "[SparseAverage]", "--algorithm", "ATLAS", "--algorithm.per", "row", "--algorithm.steps", "3"]
    out = done("search", *EXPERTS, *how, "--tasks", tasks, "--out", "library/ab")
    merged = open_expert("library/ab")
    assert "the same command makes the expert again" in out
    assert len(json.loads((place / "library/ab/trials.json").read_text())) == 3
    record = merged.record
    assert record["method"] is None
    assert (record["hyperparameters"]["search"], record["hyperparameters"]["per"]) == ("ATLAS", "row")
    assert [parent["name"] for parent in record["parents"]] == ["ab-SparseAverage", "0", "1"]
    losses = validation_losses(tiny_llama_dir, task_files, merged)
    assert losses == pytest.approx({name: record["scores"][f"val_loss/{name}"] for name in losses}, rel=1e-5)
    assert run("show", "library/ab")[0] == 0
    assert run("search", *EXPERTS, *how, "--tasks", tasks, "--out", "library/again")[0] == 0
    assert open_expert("library/again").content_hash == merged.content_hash


EXPERT_OF = "{upper: library/0, reverse: library/1}"


@pytest.mark.parametrize("objective", ["loss", "distill"])
def test_experts_answer_inputs_in_the_place_of_labels(done, place, tasks, task_files, objective):
    inputs = []
    for task in json.loads(tasks):
        rows = [json.loads(line) for line in task_files[task["name"]].read_text().splitlines()]
        file = place / f"{task['name']}.jsonl"
        file.write_text("".join(json.dumps({key: row[key] for key in ("input", "split")}) + "\n" for row in rows))
        inputs.append({**task, "path": str(file)})
    answered = ["--labels", "experts", "--expert_of", EXPERT_OF, "--max_new_tokens", "4"]
    how = [*answered, "--algorithm", "ATLAS", "--algorithm.steps", "3", "--algorithm.objective", objective]
    for out, data in (("ab", tasks), ("inputs", json.dumps(inputs))):
        done("search", *EXPERTS, *how, "--tasks", data, "--out", f"library/{out}")
        record = open_expert(f"library/{out}").record["hyperparameters"]
        assert record["labels"] == "experts"
        assert record["expert_of"] == {"upper": "0", "reverse": "1"}
        assert record["max_new_tokens"] == 4
    assert open_expert("library/ab").content_hash == open_expert("library/inputs").content_hash


def test_merges_are_combined_with_the_experts_and_written_beside(done, place, tasks):
    merges = ["--merges", "[SparseAverage, {class_path: TIES, init_args: {keep: 0.5}}]"]
    still = ["--algorithm", "ATLAS", "--algorithm.steps", "1", "--algorithm.learning_rate", "1e-12"]
    how = [*merges, *still, "--algorithm.start", "[0.5, 0.25, 1.0]", "--tasks", tasks, "--out", "library/ab"]
    out = done("search", *EXPERTS, *how)
    assert "0.500 of library/ab-SparseAverage" in out
    names = ("ab", "ab-SparseAverage", "ab-TIES", "0")
    merged, average, ties, zero = (open_expert(f"library/{name}") for name in names)
    assert average.record["method"]["class_path"].endswith("SparseAverage")
    assert [parent["name"] for parent in merged.record["parents"]] == ["ab-SparseAverage", "ab-TIES", "0", "1"]
    for name in merged:
        exact = 0.5 * average[name].dense() + 0.25 * ties[name].dense() + zero[name].dense()
        torch.testing.assert_close(merged[name].dense(), exact, rtol=1e-5, atol=1e-7)


def test_merges_of_one_class_are_numbered_and_write_no_experts_beside_them(run, place, tasks):
    merges = ["--merges", "[EMR, {class_path: EMR, init_args: {scale: 0.5}}]", "--algorithm", "ATLAS"]
    still = ["--algorithm.steps", "1", "--algorithm.learning_rate", "1e-12"]
    code, out, _ = run("search", *EXPERTS, *merges, *still, "--tasks", tasks, "--out", "library/ab/")
    assert code == 0
    assert out.count("  0.500 of library/ab-EMR") == 2  # the mean of the merges, unless `start` says another
    folders = sorted(path.name for path in (place / "library").iterdir() if path.is_dir())
    assert folders == ["0", "1", "ab", "ab-EMR", "ab-EMR-2"]
    one, half = open_expert("library/ab-EMR"), open_expert("library/ab-EMR-2")
    assert half.record["method"]["init_args"]["scale"] == 0.5
    for name in one:
        torch.testing.assert_close(0.5 * one[name].dense(), half[name].dense())


def test_a_search_that_finds_nothing_better_than_the_base_says_so(run, place, tasks):
    how = ["--algorithm", "LoRAHub", "--algorithm.steps", "1", "--algorithm.penalty", "1e6", "--tasks", tasks]
    code, out, _ = run("search", *EXPERTS, *how, "--out", "library/ab")
    assert code == 0
    assert "so the merge moves nothing" in out


MERGE = ["merge", *EXPERTS, "--method", "SparseAverage", "--out", "library/ab"]
SEARCH = ["search", *EXPERTS, "--algorithm", "LoRAHub", "--out", "library/ab"]
MERGED = ["search", "--merges", "[TIES]", "--algorithm", "ATLAS", "--out", "library/q", "--tasks", "TASKS"]
MISTAKES = [
    ([*MERGE, "--tune.rows", "8"], 1, "no rows are given, and 2 of 2 experts keep no inputs, such as"),
    ([*MERGE, "--tune.row", "8"], 2, "there is no option --tune.row; did you mean --tune.rows?"),
    ([*MERGE, "--tune", "--tasks", "HELD_OUT"], 1, "upper, reverse: the rows of a held-out task are reserved"),
    ([*MERGE, "--tune", "--tasks", "TASKS", "--per_weight", "{'.*': null}"], 1, "leave per_weight out"),
    ([*MERGE, "--tasks", "TASKS"], 1, "such as Distilled; add --tune"),
    ([*SEARCH], 1, "no rows are given, and 2 of 2 experts keep no inputs, such as"),
    ([*MERGED, "--experts", "library/0", "library/q-TIES", "--overwrite"], 1, "to library/q-TIES, which is among the"),
    ([*MERGED, "--experts", "[library/0, library/1]"], 1, "library/q-TIES exists already"),
    ([*SEARCH, "--tasks", "TASKS", "--labels", "experts"], 1, "no record names the task upper"),
    ([*SEARCH, "--tasks", "TASKS", "--expert_of", EXPERT_OF], 1, "add labels=experts, or leave it out"),
    ([*SEARCH, "--tasks", "HELD_OUT", "--labels", "experts", "--expert_of", EXPERT_OF], 1, "leave the task out"),
]


def test_each_mistake_gets_one_sentence_before_the_base_is_loaded_and_leaves_nothing(run, place, tasks, monkeypatch):
    monkeypatch.delattr(Base, "load")
    held_out = json.dumps([{**task, "role": "held_out"} for task in json.loads(tasks)])
    shutil.copytree("library/0", "library/q-TIES")
    before = sorted(str(path) for path in place.rglob("*"))
    for argv, code, sentence in MISTAKES:
        found, out, err = run(*({"TASKS": tasks, "HELD_OUT": held_out}.get(item, item) for item in argv))
        assert (found, out) == (code, ""), argv
        assert sentence in err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert sorted(str(path) for path in place.rglob("*")) == before, argv


def test_an_expert_is_written_smaller_unless_its_loss_rises_too_far(
    run, done, refused, tiny_llama_dir, task_files, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = {"id": str(tiny_llama_dir), "revision": None, "fingerprint": fingerprint(tiny_llama_dir)}
    tiles = random_experts(objective_on(tiny_llama_dir, task_files))[1]
    write_expert(tmp_path / "library/a", tiles, make_record("SparseExpert", base, tasks=["upper"]))
    shrink = ["shrink", "--experts", "library/a", "--tasks", task_files["upper"]]
    out = done(*shrink, "--out", "small", "--bound", "10")
    before, after = open_expert("library/a"), open_expert("small/a")
    assert "sign, 50% of the entries (written)" in out
    assert after.record["encoding"] == "sign"
    assert run("show", "small/a")[1].splitlines()[1].split()[:5] == ["holds", "4", "BlockSparse", "in", "sign;"]
    assert sum(after.stored_bytes().values()) < 0.4 * sum(before.stored_bytes().values())
    form = "shrunk to sign, 50% of the entries, scales fitted to outputs"
    assert after.record["source"] == {"id": "a", "format": form, "content_hash": before.content_hash}
    assert run(*shrink, "--out", "small")[0] == 1
    assert run(*shrink, "--out", "small", "--overwrite")[0] == 0
    # The expert's own answers are likeliest with the expert as it was.
    words = ["--to", "sign", "--keep", "0.1", "--bound", "0", "--labels", "experts"]
    err = refused(*shrink, "--out", "smaller", *words)
    assert "no smaller form of a keeps the loss within 0; allow more with --bound" in err
