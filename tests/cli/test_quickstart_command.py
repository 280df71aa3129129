"""The quickstart ends with commands that work as typed."""

import shlex
import shutil
import sys
from pathlib import Path

from modular_experts.__main__ import main
from modular_experts.cli.study import next_steps
from modular_experts.library import Library
from modular_experts.quickstart import Plan


def test_the_commands_at_the_end_work_as_typed(tmp_path, monkeypatch, tiny_llama_dir, task_files, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["modular-experts"])
    shutil.copytree(tiny_llama_dir, "runs/quick start/base")
    plan, place = Plan(), Path("runs/quick start")
    assert max(len(line) for step in next_steps(plan, Path("runs/quickstart")) for line in step.splitlines()) <= 78
    kind = plan.kinds[0]
    for task in list(plan.held_in)[:2]:
        fit = f"""fit --model.base '{place}/base' --model.modules '.*q_proj' --model.expert LoRAExpert
            --data.tasks '[{{"name": "{task}", "path": "{task_files["upper"]}"}}]' --trainer.max_steps 1
            --trainer.callbacks+ ExportExpert --trainer.callbacks.library '{place}/library'
            --trainer.callbacks.name {kind}-{task}"""
        assert main(shlex.split(fit)) == 0
    for command in next_steps(plan, place):
        words = shlex.split(command.replace("\\\n", " "))
        assert words[0] == "modular-experts"
        assert main(words[1:]) == 0, capsys.readouterr().err
    assert "two" in Library(place / "library")
