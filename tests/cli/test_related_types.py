"""Experts of the related systems that state a delta go the whole way: fit, merge, apply, test, export, push.

Both orientations of a weight are covered: Llama stores `(out, in)`, GPT-2 `(in, out)`.
"""

from __future__ import annotations

import json
from pathlib import Path

import conftest
import pytest
import torch
from testbed.whole_way import fit_beside_another, merge_and_apply, push_and_pull

from modular_experts.interop.peft import read_peft
from modular_experts.library import open_expert

SYSTEMS: dict[str, tuple[list[str], list[dict], int]] = {
    "tt-lora": (["TTLoRAExpert", "--model.expert.rank", "3"], [], 3),
    "adamix": (["AdaMixExpert", "--model.expert.rank", "3"], [], 3),
    "glora": (
        ["GLoRAExpert", "--model.expert.rank", "3", "--model.expert.a", "none"],
        [{"class_path": "RandomPaths"}],
        3,
    ),
    "xgblora": (["BoostedLoRAExpert"], [{"class_path": "Boosting", "init_args": {"every": 2, "share": 1.0}}], 3),
}
"""The arguments of each expert, the callbacks that it needs, and the rank of its delta."""


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_an_expert_is_trained_merged_applied_tested_exported_and_pushed(
    system: str, architecture: str, tiny, two_task_files, run, hub
) -> None:
    base, (expert, callbacks, rank) = tiny(architecture), SYSTEMS[system]
    place = ["--model.modules", conftest.TARGETS[architecture], "--model.expert"]
    mine = [*place, *expert, "--trainer.callbacks", json.dumps(callbacks)]
    made = fit_beside_another(run, base, mine, [*place, "SparseExpert", "--model.expert.keep_ratio", "0.2"])
    assert made.mergeable
    assert set(made.forms().values()) == {"LowRank"}
    ranks = {made[name].rank for name in made}
    assert ranks == {rank}
    assert any(made[name].norm() > 0 for name in made)

    merge_and_apply(run, base)

    assert run("export", "--expert", "library/mine", "--form", "lora", "--out", "adapter")[0] == 0
    assert json.loads(Path("adapter/adapter_config.json").read_text())["r"] == rank
    for name, delta in read_peft("adapter").deltas:
        assert (delta - made[name]).norm() <= 1e-6 * made[name].norm()

    push_and_pull(run, made)


CONFIGS = Path(__file__).parents[2] / "configs" / "fit"


@pytest.mark.parametrize("architecture", conftest.ARCHITECTURES)
def test_the_configs_run_on_every_architecture_and_their_experts_merge(architecture, tiny, two_task_files, run) -> None:
    base, targets = tiny(architecture), ["--model.modules", conftest.TARGETS[architecture]]
    own = {"tt-lora": targets, "adamix": targets, "xgblora": targets, "relora": targets, "recast": []}
    tasks = ["--data.tasks", json.dumps([{"name": "mine", "path": "a.jsonl"}]), "--trainer.max_steps", 2]
    for config, modules in own.items():
        file = CONFIGS / f"{config}.yaml"
        assert run("fit", "--config", file, "--model.base", base, *modules, *tasks)[0] == 0
    for kind in ("LoRAExpert", "SparseExpert", "FullExpert"):
        settings = ["--model.base", base, *targets, "--model.expert", kind, *tasks, "--out", f"library/{kind}"]
        assert run("fit", *settings)[0] == 0
    experts = sorted(Path("library").iterdir())
    assert len(experts) == 8
    assert run("merge", "--experts", *experts, "--method", "TaskArithmetic", "--out", "all")[0] == 0
    opened, merged = list(map(open_expert, experts)), open_expert("all")
    assert merged.keys() == {name for expert in opened for name in expert}
    for name in merged:
        wanted = sum(expert[name].dense() for expert in opened if name in expert)
        assert wanted.any()
        torch.testing.assert_close(merged[name].dense(), wanted, rtol=1e-5, atol=1e-7)
