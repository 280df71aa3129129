"""`route`: a routed expert in a library, from its experts' inputs to the commands that use it, and every mistake."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from testbed.random_deltas import random_delta
from testbed.runs import mixture
from testbed.scripts import run_in_a_copy

from modular_experts import generate
from modular_experts.__main__ import main
from modular_experts.base import Base
from modular_experts.base.apply import applied
from modular_experts.base.files import fingerprint
from modular_experts.cli.functions import _USUAL
from modular_experts.evaluation import evaluate, measure
from modular_experts.injection.attach import attached
from modular_experts.library import make_record, open_expert, open_statistics, write_expert
from modular_experts.merging.gradient_search import ATLAS
from modular_experts.merging.merged import merge
from modular_experts.merging.route import route
from modular_experts.routing import DEFAULT_ROUTER, KernelRidge, Oracle

TASKS = ["upper", "reverse", "first"]
WEIGHTS = {"model.layers.0.self_attn.q_proj.weight": (32, 32), "model.layers.1.mlp.down_proj.weight": (32, 48)}


@pytest.fixture
def place(tiny_llama_dir, task_files, tmp_path, monkeypatch):
    """A directory to stand in, with an expert for each of three tasks, and a fourth one to fall back on."""
    monkeypatch.chdir(tmp_path)
    base = {"id": str(tiny_llama_dir), "revision": None, "fingerprint": fingerprint(tiny_llama_dir)}
    for seed, name in enumerate([*TASKS, "merged"]):
        drawn = [random_delta("Sparse", shape, seed, torch.float32, share=0.25) for shape in WEIGHTS.values()]
        deltas = {weight: delta * 0.5 for weight, delta in zip(WEIGHTS, drawn, strict=True)}
        tasks = [name] if name in TASKS else TASKS
        write_expert(tmp_path / "library" / name, deltas, make_record("SparseExpert", base, tasks=tasks))
    return tmp_path


@pytest.fixture
def tasks(task_files) -> str:
    return json.dumps([{"name": name, "path": str(task_files[name])} for name in TASKS])


ALWAYS = ["--router", "Centroid", "--router.reject", "null"]
EXPERTS = ["--experts", *[f"library/{name}" for name in TASKS]]


def test_the_usual_classes_of_the_command_line_are_those_of_python() -> None:
    assert {"router": DEFAULT_ROUTER.__name__, "algorithm": ATLAS.__name__} == _USUAL


def test_a_routed_expert_gives_each_task_what_its_own_expert_gives(run, done, place, tasks, tiny_llama_dir, task_files):
    # Without --router, --router.reject is a setting of the usual one.
    out = done("route", *EXPERTS, "--tasks", tasks, "--router.reject", "null", "--out", "library/r")
    assert "KernelRidge(ridge=3e-06, shrink=0.3, depths=[0.0, 0.25]) chooses among 3 experts\n" in out
    made = open_expert("library/r")
    assert [parent["name"] for parent in made.record["parents"]] == TASKS
    assert made.record["tasks"] == TASKS
    settings = made.record["hyperparameters"]
    assert (settings["router"], settings["reject"]) == ("KernelRidge", None)
    data = mixture({name: task_files[name] for name in TASKS}, tiny_llama_dir)
    found = evaluate(None, {"routed": ["library/r"], **{name: [f"library/{name}"] for name in TASKS}}, data)
    losses = {(row["model"], row["task"]): row["value"] for row in found.rows if row["metric"] == "loss"}
    for name in TASKS:
        # Test rows are other words than those that the router saw.
        assert losses["routed", name] == pytest.approx(losses[name, name], rel=1e-5)
        other = TASKS[TASKS.index(name) - 1]
        assert abs(losses["routed", name] - losses[other, name]) > 1e-3
    # The router does not choose the fallback, even where the fallback stands among the experts.
    code, out, err = run("route", *EXPERTS, "library/merged", "--fallback", "library/merged", "--out", "library/s")
    assert code == 0, err
    assert "chooses among 3 experts, and library/merged for prompts that it rejects" in out
    assert [parent["name"] for parent in open_expert("library/s").record["parents"]] == [*TASKS, "merged"]


def test_prompts_are_measured_on_the_base_and_without_answers(place, tasks, tiny_llama_dir, task_files):
    assert main(["statistics", *EXPERTS, "--kind", "prompts", "--tasks", tasks]) == 0
    stored = open_statistics(open_expert("library/upper"), "prompts")
    assert list(stored) == ["depth 0", "depth 0.25", "depth 0.5", "depth 0.75", "depth 1", "n-grams"]
    rows = [json.loads(line) for line in task_files["upper"].read_text().splitlines()]
    texts = [row["input"] for row in rows if row["split"] != "test"]
    model, tokenizer = Base.open(tiny_llama_dir).load(), Base.open(tiny_llama_dir).tokenizer()
    wanted = []
    for text in texts:
        with torch.no_grad():
            states = model(torch.tensor([tokenizer(text)["input_ids"]]), output_hidden_states=True).hidden_states
        wanted.append(torch.nn.functional.normalize(states[1][0, 1:].mean(0), dim=0))
    found, wanted = stored["depth 0.5"].values, torch.stack(wanted)
    assert found.shape == (18, 32)
    # The rows come in the order of their lengths.
    torch.testing.assert_close(
        found[found[:, 0].sort().indices], wanted[wanted[:, 0].sort().indices], rtol=1e-4, atol=1e-5
    )


def test_another_expert_leaves_what_the_library_has_of_the_first_ones(run, place, tasks):
    how = ["--tasks", tasks, "--router", "KernelRidge"]
    assert run("route", *EXPERTS[:-1], *how, "--out", "library/two")[0] == 0
    files = {file: file.read_bytes() for file in place.glob("library/*/statistics/*")}
    assert len(files) == 2
    assert run("route", *EXPERTS, *how, "--out", "library/three")[0] == 0
    assert len(list(place.glob("library/*/statistics/*"))) == 3
    assert all(file.read_bytes() == before for file, before in files.items())
    assert len(open_expert("library/three").record["parents"]) == 3


def test_the_commands_take_a_routed_expert(run, place, tasks, tiny_llama_dir, task_files, monkeypatch):
    assert run("route", *EXPERTS, *ALWAYS, "--tasks", tasks, "--out", "library/r")[0] == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("upper bat:"))
    answer = generate(None, "upper bat:", "library/r", 5)
    assert run("chat", "library", "--expert", "auto", "--max_new_tokens", "5") == (0, f"{answer}  [upper]\n", "")
    strict = ["--router", "Centroid", "--router.reject", "0.99", "--fallback", "library/first", "--tasks", tasks]
    assert run("route", *EXPERTS[:-1], *strict, "--out", "library/strict")[0] == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("zq xj"))
    out = run("chat", "library", "--expert", "strict", "--max_new_tokens", "5")[1]
    assert out.endswith("  [no expert takes this prompt; first answers]\n")
    how = ["--base", tiny_llama_dir, "--experts", "library/r", "--tasks", task_files["upper"]]
    assert run("test", *how, "--trainer.logger", "false")[0] == 0
    (results,) = place.rglob("results.json")
    loss = json.loads(results.read_text())["tasks"]["upper"]["loss"]
    data = mixture({"upper": task_files["upper"]}, tiny_llama_dir)
    data.setup("test")
    model = Base.open(tiny_llama_dir).load()
    with applied(model, "library/upper"):
        alone = measure(model, Base.open(tiny_llama_dir).tokenizer(), data.test_dataloader(), data.roles)
    assert loss == pytest.approx(alone["tasks"]["upper"]["loss"], rel=1e-5)
    assert run("generate", "--experts", "library/r", "upper bat:")[0] == 0
    code, out, _ = run("show", "library/r")
    assert code == 0
    assert "upper, reverse, first" in out
    assert "norm" not in out, "a routed expert has no deltas to measure"
    assert run("verify", "library")[0] == 0
    assert "routed" in run("list", "library")[1]


def test_a_routed_expert_is_not_merged_or_added_and_finds_its_experts(refused, place, tiny_llama_dir):
    route(EXPERTS[1:], "library/r", Oracle())
    sentence = "r cannot be merged or added to its base, because its router chooses experts by the input; "
    err = refused("merge", "--experts", "library/r", "library/upper", "--method", "Average", "--out", "library/x")
    assert "1 of 2 experts cannot be used: library/r: r cannot be merged" in err
    assert err.endswith("Leave them out with --skip\n")
    for command in (["apply", "--experts", "library/r"], ["export", "library/r", "--form", "lora"]):
        err = refused(*command, "--out", "x")
        assert f"{sentence}evaluate, generate and serve use it as it is" in err
    err = refused("generate", "--experts", "library/r", "library/upper", "upper bat:")
    assert "r chooses by the input, so nothing can be added to it but what was trained on top of it; name it" in err
    model = Base.open(tiny_llama_dir).load()
    shutil.move("library/first", "library/old")
    with pytest.raises(FileNotFoundError, match="r was made with first, which is missing beside it"):
        attached(model, "library/r")
    shutil.copytree("library/upper", "library/first")
    with pytest.raises(ValueError, match="first is not the expert that r was made with"):
        attached(model, "library/r")


def test_constant_gates_fit_their_experts(run, refused, place):
    how = ["route", *EXPERTS, "--router", "Constant", "--out", "library/r"]
    for weights, sentence in {"[1, 2]": "[1.0, 2.0] are 2 numbers", "[]": "[] are 0 numbers"}.items():
        err = refused(*how, "--router.weights", weights)
        assert f"Constant: weights={sentence}, and there are 3 experts" in err
    assert "Constant chooses among 3 experts" in run(*how)[1]
    assert open_expert("library/r").state()["router/shares"].tolist() == pytest.approx([1 / 3] * 3)


def test_stored_results_of_routes_with_one_state_are_told_apart(place, tasks, tiny_llama_dir, task_files):
    """An `Oracle` has no state that depends on its experts."""
    routes = {
        "first": route(EXPERTS[1:], "library/r", Oracle()),
        "other": route([*EXPERTS[1:3], "library/merged"], "library/s", Oracle()),
        "order": route(EXPERTS[:0:-1], "library/t", Oracle()),
    }
    given = {"upper": 1, "reverse": 0}
    assert route(EXPERTS[1:3], "library/u", Oracle(given)).record["hyperparameters"]["tasks"] == given
    with pytest.raises(ValueError, match="must be numbers of the 2 experts, from 0, or 2 for the fallback"):
        route(EXPERTS[1:3], "library/v", Oracle({"upper": 3}))
    assert len({tuple((n, t.tolist()) for n, t in one.state().items()) for one in routes.values()}) == 1
    assert len({one.content_hash for one in routes.values()}) == len(routes)
    data = mixture({name: task_files[name] for name in TASKS}, tiny_llama_dir)
    alone = {name: evaluate(None, one, data, max_new_tokens=None).rows for name, one in routes.items()}
    found = evaluate(None, routes, data, max_new_tokens=None, out="runs/r")
    for name in routes:
        assert [row["value"] for row in found.where(model=name).rows] == [row["value"] for row in alone[name]]
    # Each row goes to the expert of its task in either order.
    assert found.mean("loss", model="first") == found.mean("loss", model="order") != found.mean("loss", model="other")


def test_evaluate_looks_at_every_model_before_it_measures_the_first(run, place, tasks, tiny_llama_dir, task_files):
    made = route(EXPERTS[1:], "library/own", Oracle()).path / "expert.json"
    record = json.loads(made.read_text()) | {"class_path": "elsewhere.Mine"}
    write_expert(made.parent, {}, record, overwrite=True, state=open_expert(made.parent).state())
    route(EXPERTS[1:3], "library/r", Oracle())
    shutil.copytree("library/merged", "library/damaged")
    file = place / "library/damaged/delta.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    shutil.rmtree("library/reverse")
    shutil.copytree("library/first", "library/reverse")
    mistakes = {
        "own": "library/own names elsewhere.Mine, which is not a class of this package",
        "r": "reverse is not the expert that r was made with",
        "damaged": "are not what was written",
    }
    how = ["evaluate", "--base", tiny_llama_dir, "--tasks", task_files["upper"], "--out", "runs/x"]
    for name, sentence in mistakes.items():
        code, _, err = run(*how, "--experts", "library/upper", f"library/{name}")
        assert (code, sentence in err, "measuring" in err) == (1, True, False), err
        assert not (place / "runs/x/measured.jsonl").exists()


def test_verify_and_list_tell_of_the_experts_behind_a_router(run, refused, place):
    route([*EXPERTS[1:3]], "library/r", Oracle(), fallback="library/merged")
    code, out, _ = run("verify", "library/r")
    assert code == 0
    assert "library/r: intact, the router Oracle and 3 experts behind it, content hash" in out
    row = next(line for line in run("list", "library")[1].splitlines() if line.startswith(" r ") or "routed" in line)
    assert " ".join(row.split()).startswith("r routed: Oracle upper, reverse 3 experts")
    shutil.rmtree("library/reverse")
    shutil.copytree("library/first", "library/reverse")
    err = refused("verify", "library/r")
    assert "reverse is not the expert that r was made with" in err
    err = refused("verify", "library")
    assert "1 of 5 experts in library failed: r" in err


def test_a_record_leads_to_a_router_and_a_selection_of_a_user_by_the_option_trust(place, task_files, monkeypatch):
    """The commands that open it run in a process that has not seen the classes, the one that may last."""
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    Path("mine.py").write_text(
        "from modular_experts.routing import Oracle, TopK\n"
        "from modular_experts.routing.gates import Selection\n\n\nclass Mine(Oracle):\n"
        "    def __init__(self, tasks: dict[str, int] | None = None, select: Selection | None = None):\n"
        "        super().__init__(tasks)\n"
        "        self.select = select or TopK()\n\n\nclass Top(TopK):\n    pass\n"
    )

    router = ["--router", "mine.Mine", "--router.select", "mine.Top"]
    assert run_in_a_copy(["route", *EXPERTS, *router, "--out", "library/r"]) == [(0, "")]
    record = open_expert("library/r").record
    assert (record["class_path"], record["hyperparameters"]["select"]["class"]) == ("mine.Mine", "mine.Top")
    use = ["evaluate", "--experts", "library/r", "--tasks", task_files["upper"], "--out", "runs/r"]
    nobody = [*use, "--trust", "mine.Nobody"]
    (code, err), (unknown, told), trusted = run_in_a_copy(use, nobody, [*use, "--trust", "mine"])
    assert code == 1
    assert "library/r names mine.Mine, which is not a class of this package" in err
    assert "if you trust it, add --trust mine, in Python" in err
    assert (unknown, "trust: there is no module or class mine.Nobody" in told) == (1, True)
    assert trusted[0] == 0


def test_a_router_of_a_user_is_not_taken_for_a_built_in_one_of_its_name(place, tiny_llama_dir):
    class Constant(Oracle):
        pass

    made = route(EXPERTS[1:], "library/r", Constant())
    with attached(Base.open(tiny_llama_dir).load(), made) as running:
        assert type(running.router) is Constant
    with pytest.raises(ValueError, match="r cannot be merged or added to its base, because its router chooses"):
        merge(["library/r", "library/upper"], "Average", "library/new")


@pytest.mark.parametrize(
    ("experts", "out", "sentence"),
    [
        (["library/upper", "library/reverse"], "new/upper", "library/upper and the routed expert .* have one name"),
        (["library/upper", "more/upper"], "new/r", "library/upper and .*more/upper .* have one name; rename"),
        (["library/reverse", "library/first"], "more/r", "more/reverse is another expert than .*library/reverse"),
    ],
)
def test_names_that_would_meet_are_refused_before_anything_is_learned(place, monkeypatch, experts, out, sentence):
    shutil.copytree("library/first", "more/upper")
    shutil.copytree("library/first", "more/reverse")
    monkeypatch.setattr("modular_experts.merging.route._take_missing", lambda *_: pytest.fail("it learns"))
    before = sorted(place.rglob("*"))
    for overwrite in (False, True):
        with pytest.raises((ValueError, FileExistsError), match=sentence):
            route(experts, out, KernelRidge(), overwrite=overwrite)
    assert sorted(place.rglob("*")) == before
