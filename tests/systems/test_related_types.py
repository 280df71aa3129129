"""Experts of the related systems that state a delta go the whole way: fit, merge, apply, test, export, push.

Both orientations of a weight are covered: Llama stores `(out, in)`, GPT-2 `(in, out)`. The last test takes experts of
every other kind too.
"""

import json
from pathlib import Path

import conftest
import pytest
import torch
from testbed.whole_way import apply_and_test, fit_beside_another, merge_and_apply, push_and_pull

from modular_experts.discovery import SYSTEMS
from modular_experts.interop.peft import read_peft
from modular_experts.library import open_expert

_ALL: dict[str, tuple[list[str], list[dict], int]] = {
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

FOLDERS = {"tt-lora": "tt_lora", "adamix": "ada_mix", "xgblora": "boosting", "relora": "boosting"}
"""The folder of each system whose config has another name."""


def there(name: str) -> bool:
    return (SYSTEMS / FOLDERS.get(name, name)).is_dir()


@pytest.mark.parametrize(
    ("system", "architecture"), [pair for pair in zip(_ALL, ["llama", "gpt2"] * 2, strict=True) if there(pair[0])]
)
def test_an_expert_is_trained_merged_applied_tested_exported_and_pushed(
    system: str, architecture: str, tiny, two_task_files, run, hub
) -> None:
    base, (expert, callbacks, rank) = tiny(architecture), _ALL[system]
    place = ["--model.modules", conftest.TARGETS[architecture], "--model.expert"]
    mine = [*place, *expert, "--trainer.callbacks", json.dumps(callbacks)]
    made = fit_beside_another(run, base, mine, [*place, "SparseExpert", "--model.expert.keep_ratio", "0.2"])
    assert made.mergeable
    assert set(made.forms().values()) == {"LowRank"}
    ranks = {made[name].rank for name in made}
    assert ranks == {rank}
    assert any(made[name].norm() > 0 for name in made)

    merge_and_apply(run, base)

    assert run("export", "--experts", "library/mine", "--form", "lora", "--out", "adapter")[0] == 0
    assert json.loads(Path("adapter/adapter_config.json").read_text())["r"] == rank
    for name, delta in read_peft("adapter").deltas:
        assert (delta - made[name]).norm() <= 1e-6 * made[name].norm()

    push_and_pull(run, made)


CONFIGS = Path(__file__).parents[2] / "configs"
BIASED = {"gpt2", "neox"}
"""Architectures whose layers all have a bias."""


@pytest.mark.parametrize("architecture", ["gpt2", "phi3"])
def test_experts_of_every_kind_are_trained_merged_applied_and_tested(architecture, tiny, two_task_files, run) -> None:
    """By the configs of related systems, and the search over the paths that one of them trains."""
    base, targets = tiny(architecture), ["--model.modules", conftest.TARGETS[architecture]]
    of_bias = [f"--model.expert.{part}={kind}" for part, kind in {"c": "lora", "d": "vector", "e": "vector"}.items()]
    own = dict.fromkeys(["tt-lora", "adamix", "xgblora", "relora"], targets) | {"recast": []}
    own["glora"] = [*targets, *(of_bias if architecture in BIASED else [])]
    tasks = ["--tasks", json.dumps([{"name": "mine", "path": "a.jsonl"}])]
    own = {config: modules for config, modules in own.items() if there(config)}
    for config, modules in own.items():
        how = ["--config", CONFIGS / "fit" / f"{config}.yaml", "--model.base", base, *modules, *tasks]
        assert run("fit", *how, "--trainer.max_steps", 2)[0] == 0
    tiles = ["--model.expert.granularity", "block", "--model.expert.block_size", 8]
    for kind, settings in {"LoRAExpert": [], "SparseExpert": tiles, "FullExpert": []}.items():
        how = ["--model.base", base, *targets, "--model.expert", kind, *settings, *tasks, "--out", f"library/{kind}"]
        assert run("fit", *how, "--trainer.max_steps", 2)[0] == 0
    experts = sorted(Path("library").iterdir())
    assert len(experts) == 3 + len(own)
    assert run("merge", "--experts", *experts, "--method", "TaskArithmetic", "--out", "all")[0] == 0
    opened, merged = list(map(open_expert, experts)), open_expert("all")
    assert merged.keys() == {name for expert in opened for name in expert}
    for name in merged:
        wanted = sum(expert[name].dense() for expert in opened if name in expert)
        assert wanted.any()
        torch.testing.assert_close(merged[name].dense(), wanted, rtol=1e-5, atol=1e-7)
    apply_and_test(run, base, "all")

    if "glora" not in own:
        return
    paths = open_expert("library/reverse-glora")
    assert {name.rpartition(".")[2] for name in paths} == {"weight", *(["bias"] if architecture in BIASED else [])}
    limit = sum(tensor.numel() for tensor in paths.state().values()) // 2
    budget = ["--algorithm.limit", limit, "--algorithm.evaluations", 6, "--algorithm.first", 3]
    assert run("search", "--config", CONFIGS / "search" / "paths.yaml", *tasks, *budget, "--out", "small")[0] == 0
    small = open_expert("small")
    assert small.keys() <= paths.keys()
    assert 0 < sum(tensor.numel() for tensor in small.state().values()) <= limit
    trials = json.loads(Path("small/trials.json").read_text())
    assert small.record["scores"]["val_loss"] == min(trial["loss"] for trial in trials)
