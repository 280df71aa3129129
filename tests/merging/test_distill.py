"""`Distilled` is a search by row from the experts' answers, in one word, with kept inputs or with task files."""

import json
import shutil

import pytest
from testbed.runs import mixture
from testbed.searching import descent, objective_on

from modular_experts import Distilled, IsoC, SelfRegMean, distill, merge, open_expert, search
from modular_experts.base.files import fingerprint
from modular_experts.data import Inputs, TaskMixture
from modular_experts.deltas.algebra import truncated_svd
from modular_experts.library import make_record, write_expert
from modular_experts.merging.distill import without_data
from modular_experts.merging.gradient_search import ATLAS
from modular_experts.merging.objective import ValidationRows

TASKS = ("upper", "reverse")
EXPERTS = ["library/upper", "library/reverse"]
FEW = {"steps": 4, "batch": 3, "rows": 12, "max_new_tokens": 3}
OPTIONS = [word for name, value in FEW.items() for word in (f"--method.{name}", value)]


@pytest.fixture
def place(tiny_llama_dir, task_files, tmp_path, monkeypatch):
    """A directory to stand in, with an expert for each of two tasks, which keeps the inputs of its training rows."""
    monkeypatch.chdir(tmp_path)
    objective = objective_on(tiny_llama_dir, task_files)
    data = mixture({name: task_files[name] for name in TASKS}, tiny_llama_dir)
    prompts = Inputs.read_from(data, ["train"], 99).prompts
    base = {"id": str(tiny_llama_dir), "revision": None, "fingerprint": fingerprint(tiny_llama_dir)}
    for name in TASKS:
        record = make_record("SparseExpert", base, tasks=[name])
        deltas = descent(objective, name, 3.0)
        write_expert(tmp_path / "library" / name, deltas, record, inputs={name: prompts[name]})
    return tmp_path


def test_it_is_the_search_by_row_from_the_experts_answers(done, place) -> None:
    out = done("merge", *EXPERTS, "--method", "Distilled", *OPTIONS, "--out", "library/both")
    assert "merged 2 experts with Distilled(" in out
    merged = open_expert("library/both")
    data = Inputs.kept_by([open_expert(one) for one in EXPERTS])
    data.eval_batch_size = 3
    algorithm = ATLAS(4, 0.02, objective="distill", per="row", decay=True)
    rows = ValidationRows(data, 12, labels="experts", max_new_tokens=3)
    found = search(EXPERTS, algorithm, rows, "library/again", [SelfRegMean(flatten=0.5)])
    assert merged.content_hash == found.expert.content_hash
    assert merged.record["hyperparameters"]["labels"] == "experts"
    data.eval_batch_size = 5
    assert distill(EXPERTS, "library/python", Distilled(**FEW), data).expert.content_hash == merged.content_hash
    assert data.eval_batch_size == 5, "the caller's inputs stay as they were"
    shutil.copytree("library/both", "library/other-SelfRegMean")
    with pytest.raises(FileExistsError, match="other-SelfRegMean exists already"):  # before any row is read
        distill(EXPERTS, "library/other", data=TaskMixture("missing.jsonl"))


def test_task_files_give_training_and_validation_inputs(run, place, task_files) -> None:
    for name in TASKS:
        (place / "library" / name / "inputs.safetensors").unlink()
        rows = [json.loads(line) for line in task_files[name].read_text().splitlines()]
        inputs = [json.dumps({"input": row["input"], "split": row["split"]}) for row in rows if row["split"] != "test"]
        (place / f"{name}.jsonl").write_text("\n".join(inputs))
    how = ["--method", "Distilled", *OPTIONS, "--tasks", "upper.jsonl", "reverse.jsonl"]
    assert run("merge", *EXPERTS, *how, "--out", "library/inputs")[::2] == (0, "")
    data = mixture({name: task_files[name] for name in TASKS}, open_expert(EXPERTS[0]).record["base"]["id"])
    data.max_length = 1024
    same = distill(EXPERTS, "library/rows", Distilled(**FEW), data)
    assert open_expert("library/inputs").content_hash == same.expert.content_hash


def test_each_mistake_gets_one_sentence(run, place) -> None:
    with pytest.raises(ValueError, match="no formula of the deltas gives a merge by Distilled; `distill`"):
        merge(EXPERTS, "Distilled", "library/both")
    (place / "library/upper/inputs.safetensors").unlink()
    ours = ["merge", *EXPERTS, "--out", "library/both", "--method"]
    for words, sentence in [
        (["Distilled"], "no rows are given, and 1 of 2 experts keep no inputs"),
        (["Distilled", "--dry-run"], "Distilled searches, and writes an expert; give out, base"),
        (["Distilled", "--output", "checkpoint"], "give out, base, overwrite, skip and data alone"),
        (["Average", "--tasks", "a.jsonl"], "such as Distilled; add --tune"),
        (["Distilled", "--method.steps", "0"], "steps must be at least 1, got 0"),
    ]:
        code, _, err = run(*ours, *words)
        assert (code, err.count("\n"), sentence in err) == (1, 1, True), err


def test_loras_start_from_a_merge_for_loras(place) -> None:
    upper = open_expert(EXPERTS[0])
    low = {name: truncated_svd(delta, 2)[0] for name, delta in upper.items() if len(delta.shape) == 2}
    write_expert("library/low", low, upper.record)
    assert without_data([open_expert("library/low")]) == IsoC()
    assert without_data([open_expert("library/low"), upper]) == SelfRegMean(flatten=0.5)
