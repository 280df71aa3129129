"""Every file in configs/ runs as it stands, given a base, tasks and experts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from modular_experts.__main__ import main
from modular_experts.library import Library

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["modular-experts"])
    return tmp_path


def _fit(config: Path, base: Path, files: dict[str, Path], name: str) -> int:
    export = [{"class_path": "ExportExpert", "init_args": {"library": "library", "name": name}}]
    tasks = [{"name": task, "path": str(file)} for task, file in files.items()]
    own = ["--trainer.callbacks+", json.dumps(export), "--data.tasks", json.dumps(tasks), "--model.base", str(base)]
    return main(["fit", "--config", str(config), *own, "--trainer.max_steps", "2"])


@pytest.mark.parametrize("config", sorted((CONFIGS / "fit").glob("*.yaml")), ids=lambda file: file.stem)
def test_fit_config_trains_and_exports(config: Path, place, tiny_llama_dir, task_files) -> None:
    assert _fit(config, tiny_llama_dir, task_files, config.stem) == 0
    assert list(Library("library")) == [config.stem]


def test_merge_configs_merge_and_the_test_config_tests(place, tiny_llama_dir, task_files) -> None:
    for name in ("sparse", "lora"):
        assert _fit(CONFIGS / "fit" / f"{name}.yaml", tiny_llama_dir, task_files, name) == 0
    for config in sorted((CONFIGS / "merge").glob("*.yaml")):
        out = f"library/{config.stem}"
        assert (
            main(["merge", "--config", str(config), "--experts", "[library/sparse, library/lora]", "--out", out]) == 0
        )
        assert Library("library")[config.stem].record["kind"] == "merge"
    tasks = json.dumps([{"name": "upper", "path": str(task_files["upper"])}])
    test = ["test", "--config", str(CONFIGS / "test.yaml"), "--model.base", str(tiny_llama_dir), "--data.tasks", tasks]
    assert main([*test, "--model.applied", "[library/ties]", "--model.max_new_tokens", "4"]) == 0


def test_no_config_is_left_out() -> None:
    found = {str(file.relative_to(CONFIGS).parent) for file in CONFIGS.rglob("*.yaml")}
    assert found == {".", "fit", "merge"}
