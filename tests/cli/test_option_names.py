"""Slips in the options of a training command get a near name, most of them before anything heavy is imported."""

import subprocess
import sys

import pytest

from modular_experts.__main__ import main

SLIPS = {
    "--bass x": "there is no option --bass; did you mean --base?",
    "--max_steps 3": "there is no option --max_steps; did you mean --steps?",
    "--trainer.max_step 3": "there is no option --trainer.max_step; did you mean --steps?",
    "--trainer.min_step=3": "there is no option --trainer.min_step; did you mean --trainer.min_steps?",
    "--data.batchsize 3": "there is no option --data.batchsize; did you mean --batch_size?",
    "--expert Sparseexpert": "--expert: there is no class 'Sparseexpert'; did you mean SparseExpert?",
}


@pytest.mark.parametrize(("words", "sentence"), SLIPS.items())
def test_a_slip_gets_a_near_name(words, sentence, capsys) -> None:
    assert main(["fit", "--base", "base", "--tasks", "a.jsonl", *words.split()]) == 2
    assert capsys.readouterr().err == f"error: {sentence}\n"


def test_a_slip_is_refused_without_torch() -> None:
    code = "import sys; from modular_experts.__main__ import main; code = main(sys.argv[1:]); assert code == 2; "
    words = [sys.executable, "-c", code + "assert 'torch' not in sys.modules", "fit", "--bass", "x"]
    found = subprocess.run(words, capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "error: there is no option --bass; did you mean --base?\n")


def test_only_fit_has_the_options_of_an_expert_that_is_kept(capsys) -> None:
    assert main(["test", "--base", "base", "--tasks", "a.jsonl", "--out", "library/a"]) == 2
    assert "there is no option --out" in capsys.readouterr().err
