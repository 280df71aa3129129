"""A merge in fewer bytes: in bfloat16, in few directions, and what a large one tells the user to do."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from modular_experts.base.files import fingerprint
from modular_experts.data import TaskMixture
from modular_experts.deltas import LowRank
from modular_experts.library import make_record, open_expert, write_expert
from modular_experts.library.form import Form
from modular_experts.merging.merged import Merged, merge
from modular_experts.merging.objective import ValidationRows, objective_on_base

SHAPES = {"mlp.up_proj": (48, 32), "mlp.gate_proj": (48, 32), "mlp.down_proj": (32, 48), "self_attn.q_proj": (32, 32)}
PLACES = {f"model.layers.{layer}.{name}.weight": shape for layer in range(2) for name, shape in SHAPES.items()}
RANK = 6


@pytest.fixture
def place(tiny_llama_dir, task_files, tmp_path, monkeypatch):
    """A directory to stand in, with a base and a LoRA of each of two tasks."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_llama_dir, "base")
    base = {"id": "base", "revision": None, "fingerprint": fingerprint("base")}
    for seed, name in enumerate(("upper", "reverse")):
        draw = torch.Generator().manual_seed(seed)
        deltas = {}
        for weight, (rows, columns) in PLACES.items():
            factors = torch.randn(rows, RANK, generator=draw), torch.randn(RANK, columns, generator=draw)
            deltas[weight] = LowRank(*(0.05 * factor for factor in factors))
        write_expert(f"library/{name}", deltas, make_record("LoRAExpert", base, tasks=[name]))
        shutil.copy(task_files[name], f"{name}.jsonl")
    return tmp_path


BOTH = ["library/upper", "library/reverse"]
ALL = ["--method", "TIES", "--method.keep", "1"]
SHRINK = ["shrink", "library/both", "--out", "small", "--bound", "9", "--tasks", "upper.jsonl", "reverse.jsonl"]


def means() -> dict[str, torch.Tensor]:
    """Return the average of the two experts, in double precision."""
    upper, reverse = map(open_expert, BOTH)
    return {name: (upper[name].dense().double() + reverse[name].dense().double()) / 2 for name in upper}


def test_a_rank_keeps_the_nearest_matrix_and_tells_what_it_keeps(run, place):
    command = ["merge", *BOTH, "--method", "Average", "--rank", "3", "--out", "library/few"]
    code, out, err = run(*command)
    assert (code, err) == (0, "")
    kept = total = 0.0
    stored = open_expert("library/few")
    for name, mean in means().items():
        left, sizes, right = torch.linalg.svd(mean, full_matrices=False)
        nearest = left[:, :3] * sizes[:3] @ right[:3]
        torch.testing.assert_close(stored[name].dense().double(), nearest, rtol=1e-4, atol=1e-6)
        kept, total = kept + sizes[:3].square().sum().item(), total + sizes.square().sum().item()
    cut = {"rank": 3, "squared_norm": pytest.approx(total), "squared_norm_kept": pytest.approx(kept / total)}
    assert stored.record["hyperparameters"]["cut"] == cut
    assert f"rank 3 keeps {100 * kept / total:.3g} % of the merge's squared norm" in out
    whole = merge(BOTH, "Average", "library/whole")
    assert stored.content_hash != whole.content_hash
    assert stored.size_on_disk < whole.size_on_disk
    # A rank that the merge does not exceed changes nothing.
    same = merge(BOTH, "Average", "library/same", form=Form(rank=2 * RANK))
    torch.testing.assert_close(dict(same)[name].dense(), whole[name].dense())


def test_zeros_take_no_value_and_bfloat16_rounds_each_value_once(run, place):
    for method in ("SVC", "TIES"):
        whole = merge(BOTH, method, f"library/{method}")
        vector = Merged([open_expert(expert) for expert in BOTH], method)
        assert run("merge", *BOTH, "--method", method, "--dtype", "bfloat16", "--out", f"library/{method}-16")[0] == 0
        half = open_expert(f"library/{method}-16")
        assert half.record["encoding"] == "bfloat16"
        for name, delta in whole.items():
            assert torch.equal(delta.dense(), vector[name].dense())
            if not isinstance(delta, LowRank):  # the product of rounded factors
                assert torch.equal(half[name].dense(), delta.dense().bfloat16().float())
        assert half.size_on_disk < 0.7 * whole.size_on_disk
    # TIES keeps 36 % of the entries here, which the library stores with a mask of one bit an entry.
    assert set(open_expert("library/TIES").forms().values()) == {"Sparse"}
    assert open_expert("library/TIES").kept_share < 0.4
    dense = sum(4 * rows * columns for rows, columns in PLACES.values())
    assert sum(open_expert("library/TIES").stored_bytes().values()) < 0.44 * dense


def test_a_merge_larger_than_half_its_base_names_what_takes_less(run, place):
    code, out, _ = run("merge", *BOTH, *ALL, "--out", "library/both")
    assert code == 0
    line = out.splitlines()[-1]
    size, base = open_expert("library/both").size_on_disk, Path("base/model.safetensors").stat().st_size
    assert 2 * size > base
    assert line.startswith(f"it takes {size / 1000:.3g} kB, and its base {base / 1000:.3g} kB. In fewer bytes: ")
    ways = {
        "--output checkpoint": ["merge", *BOTH, *ALL, "--output", "checkpoint", "--out", "checkpoint"],
        "--dtype bfloat16": ["merge", *BOTH, *ALL, "--dtype", "bfloat16", "--out", "library/half"],
        "--rank 16": ["merge", *BOTH, *ALL, "--rank", "2", "--out", "library/few"],
        "modular-experts shrink library/both --out small --tasks ...": SHRINK,
    }
    for way, command in ways.items():
        assert way in line
        code, out, err = run(*command)
        assert code == 0, err
        assert "In fewer bytes" not in out or "--dtype" in command
    for smaller in ("library/half", "library/few", "small/both"):
        assert open_expert(smaller).size_on_disk < size


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--dtype", "float16"], "an expert is stored in float32 or bfloat16, not float16"),
        (["--rank", "2", "--output", "checkpoint"], "a checkpoint holds whole matrices"),
        (["--rank", "0"], "rank=0 must be at least 1"),
        (["--tolerance", "1"], "tolerance is a setting of a checkpoint; add --output checkpoint"),
    ],
)
def test_what_does_not_go_together_is_refused(run, place, options, sentence):
    code, _, err = run("merge", *BOTH, "--method", "TIES", *options, "--out", "library/x")
    assert code in (1, 2)
    assert sentence in err
    assert not Path("library/x").exists()


def test_the_settings_that_were_tuned_are_written_in_the_form_that_is_asked_for(run, place):
    options = ["--method", "SparseAverage", "--tune", "--tune.rows", "2", "--tasks", "upper.jsonl", "reverse.jsonl"]
    code, out, _ = run("merge", *BOTH, *options, "--rank", "2", "--dtype", "bfloat16", "--out", "library/tuned")
    assert code == 0
    stored = open_expert("library/tuned")
    # The record and the screen tell the loss with the stored expert.
    rows = ValidationRows(TaskMixture(["upper.jsonl", "reverse.jsonl"]), rows=2)
    losses = objective_on_base([stored], rows).losses_with(stored)
    scores = stored.record["scores"]
    assert {name: scores[f"val_loss/{name}"] for name in losses} == pytest.approx(losses, rel=1e-6)
    assert f"as it is stored, in fewer bytes, the merge has a loss of {scores['val_loss']:.4f} there" in out
    best = min(trial["loss"] for trial in json.loads(Path("library/tuned/trials.json").read_text()))
    assert scores["val_loss"] != pytest.approx(best, rel=1e-6)
    assert set(stored.forms().values()) == {"LowRank"}
    assert stored.record["encoding"] == "bfloat16"
    assert stored.record["hyperparameters"]["cut"]["rank"] == 2


@pytest.mark.parametrize("count", [3, len(PLACES)])
def test_an_interrupted_merge_of_few_directions_states_the_norm_of_all_weights(place, count):
    form = Form(rank=3)
    with pytest.raises(KeyboardInterrupt):
        merge(BOTH, "Average", "library/few", form=form, progress=lambda names: stopped(names, count))
    few, whole = merge(BOTH, "Average", "library/few", form=form), merge(BOTH, "Average", "library/whole", form=form)
    assert few.content_hash == whole.content_hash
    assert few.record["hyperparameters"]["cut"] == pytest.approx(whole.record["hyperparameters"]["cut"], rel=1e-12)


def stopped(names, count):
    """Yield the first names, and interrupt the merge after them."""
    yield from [*names][:count]
    raise KeyboardInterrupt
