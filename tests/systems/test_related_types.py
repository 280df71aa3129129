"""Experts of the related systems that state a delta go the whole way: fit, merge, apply, test, export, push.

Both orientations of a weight are covered: Llama stores `(out, in)`, GPT-2 `(in, out)`.
"""

import json
from pathlib import Path

import conftest
import pytest
from testbed.whole_way import fit_beside_another, merge_and_apply, push_and_pull

from modular_experts.discovery import SYSTEMS
from modular_experts.interop.peft import read_peft

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
