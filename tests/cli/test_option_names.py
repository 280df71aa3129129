"""Slips in the options of a training command are refused before anything heavy is imported."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI

from modular_experts.cli.option_names import check_option_names
from modular_experts.data import TaskMixture
from modular_experts.training.module import ExpertModule

SLIPS = {
    "--bass x": "there is no option --bass; did you mean --base?",
    "--max_steps 3": "there is no option --max_steps; did you mean --steps?",
    "--trainer.max_step 3": "there is no option --trainer.max_step; did you mean --steps?",
    "--trainer.min_step=3": "there is no option --trainer.min_step; did you mean --trainer.min_steps?",
    "--data.batchsize 3": "there is no option --data.batchsize; did you mean --batch_size?",
    "--expert Sparseexpert": "--expert: there is no class 'Sparseexpert'; did you mean SparseExpert?",
}


@pytest.mark.parametrize(("words", "sentence"), SLIPS.items())
def test_a_slip_gets_the_sentence_of_the_parser(words, sentence) -> None:
    with pytest.raises(ValueError, match="^" + sentence.replace("?", r"\?") + "$"):
        check_option_names("fit", ["--base", "base", *words.split()])


def test_a_slip_is_refused_without_torch() -> None:
    code = "import sys; from modular_experts.__main__ import main; code = main(sys.argv[1:]); assert code == 2; "
    words = [sys.executable, "-c", code + "assert 'torch' not in sys.modules", "fit", "--bass", "x"]
    found = subprocess.run(words, capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "error: there is no option --bass; did you mean --base?\n")


def test_every_option_of_every_command_passes() -> None:
    classes = {"model": ExpertModule, "data": TaskMixture, "trainer": Trainer}
    fields = [f"--{group}.{name}" for group, kind in classes.items() for name in inspect.signature(kind).parameters]
    for verb, skipped in LightningCLI.subcommands().items():
        given = [
            name for name in inspect.signature(getattr(Trainer, verb)).parameters if name not in skipped | {"self"}
        ]
        check_option_names(
            verb, [*fields, *(f"--{name}" for name in given), "--trainer.callbacks+=X", "--print-config"]
        )
    check_option_names("fit", ["--out", "a", "--overwrite", "--dry-run", "--expert", "mine.SparseExpertt"])
    check_option_names("fit", ["--expert", "Mine", "--unlike_anything", "1"])
