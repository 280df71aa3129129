"""A class that a config names for the model, the data or the trainer is the class that runs, and the files say so."""

import sys
from pathlib import Path

import pytest
import yaml

from modular_experts.__main__ import main
from modular_experts.library import open_expert

OWN = """
from lightning.pytorch import Trainer as LightningTrainer
from modular_experts import ExpertModule, TaskMixture

RAN = []


class Module(ExpertModule):
    def __init__(self, base: str, factor: float = 1.0, **settings):
        super().__init__(base, **settings)
        self.factor = factor

    def training_step(self, batch, *rest):
        RAN.append(f"module {self.factor}")
        return super().training_step(batch, *rest)


class Mixture(TaskMixture):
    def train_dataloader(self):
        RAN.append("data")
        return super().train_dataloader()


class Trainer(LightningTrainer):
    def fit(self, *given, **more):
        RAN.append("trainer")
        return super().fit(*given, **more)
"""
CONFIG = {
    "model": {
        "class_path": "own_classes.Module",
        "init_args": {"base": "base", "factor": 2.0, "modules": ["q_proj"], "expert": "LoRAExpert"},
    },
    "data": {"class_path": "own_classes.Mixture", "init_args": {"tasks": ["a.jsonl"]}},
    "trainer": {"class_path": "own_classes.Trainer", "init_args": {"max_steps": 1}},
    "out": "library/mine",
}


def test_the_classes_that_a_config_names_run(
    two_task_files: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("base").symlink_to(tiny_llama_dir)
    monkeypatch.setattr(sys, "path", [str(Path.cwd()), *sys.path])
    monkeypatch.setattr(sys, "argv", ["modular-experts"])
    Path("own_classes.py").write_text(OWN)
    Path("config.yaml").write_text(yaml.safe_dump(CONFIG))
    assert main(["fit", "--config", "config.yaml"]) == 0
    import own_classes

    assert {*own_classes.RAN} == {"trainer", "data", "module 2.0"}
    assert open_expert("library/mine").record["kind"] == "LoRAExpert"
    (saved,) = Path("runs").rglob("config.yaml")
    settings = yaml.safe_load(saved.read_text())
    for group in ("model", "data", "trainer"):
        assert settings[group]["class_path"] == CONFIG[group]["class_path"]
    assert settings["model"]["init_args"]["factor"] == 2.0
