"""The commands train the gates of Phatgoose, a vector for each layer, and route by them."""

import json
from pathlib import Path

import pytest
import torch
from test_routed import delta
from testbed.runs import mixture

from modular_experts.__main__ import main
from modular_experts.base import Base
from modular_experts.base.files import fingerprint
from modular_experts.deltas import Delta
from modular_experts.injection.attach import attached
from modular_experts.library import make_record, open_expert, open_statistics, write_expert
from modular_experts.merging.statistics import take_statistics

TASKS = ["upper", "reverse", "first"]
WEIGHTS = ["model.layers.0.self_attn.v_proj.weight", "model.layers.1.mlp.down_proj.weight"]
TOKENS = 3 + torch.arange(24).view(2, 12)


def library(base: Path, folder: Path) -> list[str]:
    """Write an expert for each task, of which the last leaves the first weight alone; return their directories."""
    found, shapes = [], Base.open(base).structure.shapes
    record = {"id": str(base), "revision": None, "fingerprint": fingerprint(base)}
    for number, task in enumerate(TASKS):
        deltas: dict[str, Delta] = {}
        for place, weight in enumerate(WEIGHTS[number == 2 :]):
            form = ["low rank", "entries", "tiles"][(number + place) % 3]
            deltas[weight] = delta(form, shapes[weight], 7 * number + place).to(dtype=torch.float32)
        write_expert(folder / "library" / task, deltas, make_record("made", record, tasks=[task]))
        found.append(str(folder / "library" / task))
    return found


@pytest.fixture
def stored_experts(tiny_llama_dir, tmp_path, monkeypatch, task_files) -> tuple[list[str], str]:
    """Experts in the current directory, and their tasks as an option of a command."""
    monkeypatch.chdir(tmp_path)
    tasks = json.dumps([{"name": name, "path": str(task_files[name])} for name in TASKS])
    return library(tiny_llama_dir, tmp_path), tasks


def test_the_command_trains_the_gates_that_phatgoose_needs(tiny_llama_dir, stored_experts, monkeypatch) -> None:
    monkeypatch.setattr("modular_experts.merging.gate_statistics.STEPS", 3)
    experts, tasks = stored_experts
    out = ["--router", "Phatgoose", "--out", "library/routed"]
    assert main(["route", "--experts", *experts, "--tasks", tasks, *out]) == 0
    state = open_expert("library/routed").state()
    stored = [open_statistics(open_expert(place), "gates") for place in experts]
    for name in WEIGHTS:
        gates = state[f"{name}/gates"]
        wanted = [one[name].values if name in one else torch.zeros(gates.shape[1]) for one in stored]
        assert torch.equal(gates, torch.stack(wanted))
    assert not state[f"{WEIGHTS[0]}/gates"][2].any()
    model = Base.open(tiny_llama_dir).load()
    with torch.no_grad():
        alone = model(input_ids=TOKENS).logits
        with attached(model, "library/routed"):
            assert (model(input_ids=TOKENS).logits - alone).abs().max() > 1e-2


def test_statistics_trains_the_gates_of_stored_experts(tiny_llama_dir, stored_experts, task_files, capsys) -> None:
    experts, tasks = stored_experts
    before = [open_expert(place).content_hash for place in experts]
    assert main(["statistics", *experts, "--kind", "gates", "--tasks", tasks, "--steps", "2"]) == 0
    assert "gates.safetensors: gates statistics of" in capsys.readouterr().out
    assert [open_expert(place).content_hash for place in experts] == before
    (wanted,) = take_statistics(experts[:1], "gates", mixture(task_files, tiny_llama_dir), overwrite=True, steps=2)
    found = {name: wanted[name].values for name in wanted}
    assert main(["statistics", experts[0], "--kind", "gates", "--tasks", tasks, "--steps", "2", "--overwrite"]) == 0
    again = open_statistics(open_expert(experts[0]), "gates")
    assert all(torch.equal(again[name].values, found[name]) for name in found)
    assert main(["route", "--experts", *experts, "--router", "Phatgoose", "--out", "library/routed"]) == 0
    capsys.readouterr()
    assert main(["statistics", experts[0], "--kind", "gates", "--tasks", tasks]) == 1
    assert "overwrite" in capsys.readouterr().err
