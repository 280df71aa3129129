"""Models compute where the user says, in one place for all commands."""

import pytest
import torch

from modular_experts import use_device
from modular_experts.base.device import VARIABLE, device, trainer_device


@pytest.fixture(autouse=True)
def unnamed(monkeypatch):
    monkeypatch.setenv(VARIABLE, "")  # so that it is as before afterwards
    monkeypatch.delenv(VARIABLE)


def test_a_gpu_is_taken_unless_the_user_names_a_device(monkeypatch) -> None:
    assert device() == torch.device("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (device(), trainer_device()) == (torch.device("cuda"), {})
    use_device("cpu")
    assert (device(), trainer_device()) == (torch.device("cpu"), {"accelerator": "cpu"})
    monkeypatch.setenv(VARIABLE, "cuda:1")
    assert trainer_device() == {"accelerator": "cuda", "devices": [1]}


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "xpu:7"])
def test_a_device_that_is_not_there_is_refused(name, refused, tiny_llama_dir) -> None:
    with pytest.raises(ValueError, match=f"there is no device '{name}' here; compute on cpu"):
        use_device(name)
    assert f"there is no device {name!r} here" in refused("generate", "a", "--base", tiny_llama_dir, "--device", name)
    assert device().type != "xpu"


def test_every_command_that_computes_takes_it(run, refused, tiny_llama_dir, task_files, tmp_path) -> None:
    tasks = ["--tasks", *list(task_files.values())[:1]]
    code, _, err = run("evaluate", "--base", tiny_llama_dir, *tasks, "--device", "cpu", "--out", tmp_path)
    assert code == 0, err
    assert device().type == "cpu"
    nowhere = refused("test", "--base", tiny_llama_dir, *tasks, "--device", "nowhere")
    assert "there is no device 'nowhere' here" in nowhere
    for verb in ("evaluate", "fit"):
        assert "--device NAME" in run(verb, "--help-all")[1]
    code, _, err = run("list", "library", "--device", "cpu")
    assert (code, "--device" in err) == (2, True)
