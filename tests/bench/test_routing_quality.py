"""benchmarks/routing_quality.py tests every router, each row with the experts that its router chooses."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from modular_experts import routing
from modular_experts.base import Base
from modular_experts.base.files import fingerprint
from modular_experts.data import TaskMixture
from modular_experts.deltas import Sparse
from modular_experts.jobs import JSONLines
from modular_experts.library import make_record, write_expert

WEIGHTS = {"model.layers.0.self_attn.q_proj.weight": (32, 32), "model.layers.1.mlp.down_proj.weight": (32, 48)}
TASKS = ["upper", "reverse", "shout"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("routing_quality")


@pytest.fixture
def world(tiny_llama_dir, task_files, tmp_path) -> SimpleNamespace:
    """Three experts of a tiny base, and a fourth task that nobody was trained on."""
    files = task_files | {"shout": tmp_path / "shout.jsonl"}
    files["shout"].write_text(task_files["upper"].read_text().replace("upper ", "shout "))
    base = {"id": str(tiny_llama_dir), "revision": None, "fingerprint": fingerprint(tiny_llama_dir)}
    for seed, task in enumerate(TASKS):
        made = torch.Generator().manual_seed(seed)
        deltas = {}
        for weight, shape in WEIGHTS.items():
            size = shape[0] * shape[1]
            indices = torch.randperm(size, generator=made)[: size // 4].sort().values.int()
            deltas[weight] = Sparse(indices, 0.5 * torch.randn(size // 4, generator=made), torch.Size(shape))
        write_expert(tmp_path / f"sparse-{task}", deltas, make_record("SparseExpert", base, tasks=[task]))
    opened = Base.open(tiny_llama_dir)
    return SimpleNamespace(
        tasks=TASKS,
        seed=0,
        model=opened.load(),
        tokenizer=opened.tokenizer(),
        new_tokens=3,
        expert=lambda kind, task: tmp_path / f"{kind}-{task}",
        mixture=lambda names, held_out=False: TaskMixture(
            [{"name": name, "path": str(files[name])} for name in names]
            + [{"name": "first", "path": str(files["first"]), "role": "held_out"}] * held_out,
            tokenizer=str(tiny_llama_dir),
        ),
    )


def test_every_router_of_the_package_is_measured(script) -> None:
    made = {type(way.router()) for way in script.WAYS.values() if way.router}
    kinds = {kind for kind in vars(routing).values() if isinstance(kind, type) and issubclass(kind, routing.Router)}
    assert kinds - made == {routing.Router, routing.Constant}, "add a line to WAYS in benchmarks/routing_quality.py"


def test_a_mixture_gives_what_each_expert_gives_alone(script, world, monkeypatch) -> None:
    alone = script._tested(world, 0, "sparse", "the experts alone", stripped=False)
    assert alone["right"] == dict.fromkeys(TASKS, 1.0)
    assert alone["rejected"] == dict.fromkeys(TASKS, 0.0) | {"first": 1.0}
    oracle = script.Way(routing.Oracle, mixed=True)
    monkeypatch.setitem(script.WAYS, "mixed", oracle)
    mixed = script._tested(world, 0, "sparse", "mixed", stripped=False)
    for score in script.SCORES:
        assert mixed[score] == pytest.approx(alone[score], rel=1e-5)


def test_all_ways_give_a_row_of_the_table(script, world, tmp_path, capsys) -> None:
    names = [name for name in script.WAYS if "merge" not in name]
    script._train_gates(world, "sparse")
    store = JSONLines(tmp_path / "routing.jsonl")
    for name in names:
        found = script._tested(world, 0, "sparse", name, stripped=False)
        store[0, "sparse", name] = found
    # The tiny experts answer nothing right, so that there is no share of their score.
    options = SimpleNamespace(seeds=[0], routers=names[1:])
    rows = {name: script._row("sparse", name, store, options) for name in names}
    assert rows["Classifier"]["right"] > 0.9
    assert rows["Classifier, two experts"]["right"] == rows["Classifier"]["right"]
    assert rows["Classifier, two experts"]["loss"] != rows["Classifier"]["loss"]
    for name in ("Arrow", "GenKnowSub", "Energy", "Phatgoose"):
        assert rows[name]["right"] is None
        assert rows[name]["loss"] != rows["the experts alone"]["loss"]
    script._print(list(rows.values()), [0])
    assert "| Arrow | " in capsys.readouterr().out


def test_costs_are_those_of_all_experts_in_the_model_beside_the_base(script, world, tmp_path, capsys) -> None:
    keys = [(0, "sparse", "Centroid"), (0, "sparse", "the experts alone"), (0, "sparse", "Arrow")]
    store = JSONLines(tmp_path / "costs.jsonl")
    for key in keys:
        store[key] = script._cost(world, *key)
    base = sum(parameter.nbytes for parameter in world.model.parameters())
    # A value of four bytes and a column of two, and where each row begins.
    packed = len(TASKS) * sum(6 * (out * inputs // 4) + 4 * (out + 1) for out, inputs in WEIGHTS.values())
    prototypes = 4 * len(TASKS) * sum(inputs for _, inputs in WEIGHTS.values())
    assert store[keys[1]]["bytes"] == [base, packed]
    assert store[keys[2]]["bytes"] == [base, packed + prototypes]
    assert store[keys[0]]["bytes"][1] > packed
    assert all(0 < alone < 100 * behind for alone, behind in (store[key]["seconds"] for key in keys))
    script._show_costs(keys, store, SimpleNamespace(seeds=[0], json=False))
    shown = capsys.readouterr().out.splitlines()
    ratio = store[keys[2]]["seconds"][1] / store[keys[2]]["seconds"][0]
    assert shown[-1] == f"| sparse | Arrow | {ratio:.2f} | {(packed + prototypes) / base:.2f} |"
