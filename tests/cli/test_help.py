"""Help shows every option and imports no torch; common commands import neither Lightning nor transformers."""

import importlib
import inspect
import os
import re
import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path

import pytest

import modular_experts
from modular_experts.__main__ import VERBS, main
from modular_experts.cli.words import annotations

TRAINING = [verb for verb, command in VERBS.items() if not command.function]


def python(code: str, cwd: Path | None = None) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_help_a_slip_and_a_wrong_place_of_an_expert_need_no_torch(tmp_path) -> None:
    words = [["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)]
    for name in ("dates", "mood"):
        (tmp_path / "library" / name).mkdir(parents=True)
        (tmp_path / "library" / name / "expert.json").write_text("{}")
    commands = [
        "show library/date",
        "merge library/mood library/date --out both",
        "evaluate --tasks a.jsonl --experts library/mood library/date --out runs/a",
        "fit --base base --tasks a.jsonl --experts library/date",
        "remove --merged library/date --expert library/mood --out rest",
    ]
    wanted = f"library/date is not an expert: there is no such directory; did you mean {tmp_path}/library/dates?"
    slip = "there is no option --bass; did you mean --base?"
    refused = [*((command, 1, wanted) for command in commands), ("fit --bass x", 2, slip)]
    lines = [
        "import io, sys",
        "from contextlib import redirect_stderr",
        "from modular_experts.__main__ import main",
        f"assert all(main(words) == 0 for words in {words})",
        "assert not {'torch', 'lightning', 'transformers', 'jsonargparse', 'rich'} & set(sys.modules)",
        f"for line, code, sentence in {refused}:",
        "    with redirect_stderr(io.StringIO()) as err:",
        "        assert main(line.split()) == code, line",
        "    assert err.getvalue() == f'error: {sentence}\\n', err.getvalue()",
        "assert 'torch' not in sys.modules",
    ]
    python("\n".join(lines), tmp_path)


def test_import_is_lazy_and_common_commands_import_neither_lightning_nor_transformers(tmp_path) -> None:
    commands = [
        "list library",
        "show library/a",
        "methods TIES",
        "methods",
        "merge --experts library/a library/b --method TIES --out library/ab",
        "merge --experts library/a library/b --method TIES --out library/ab --dry-run",
        "merge --experts library/a library/b --method RAM --out library/ram",
        "remove --merged library/average --expert library/b --out library/rest",
    ]
    lines = [
        "import sys, modular_experts",
        "dir(modular_experts)",
        "assert 'torch' not in sys.modules",
        "import modular_experts.native.triton_tiles",
        "assert 'triton' not in sys.modules",  # what follows uses parts of torch that import it, too
        "import modular_experts.experts, modular_experts.methods",
        "others = {'lightning', 'transformers', 'datasets', 'safetensors', 'jsonargparse'}",
        "assert not others & set(sys.modules)",
        "modular_experts.Sparse, modular_experts.TIES, modular_experts.SparseExpert, modular_experts.merge",
        "assert not {'lightning', 'transformers'} & set(sys.modules)",
        "import torch",
        "from modular_experts.__main__ import main",
        "from modular_experts import Sparse, Average, merge",
        "from modular_experts.library import make_record, write_expert",
        "for name in 'abc':",
        "    delta = Sparse(torch.tensor([1, 5]), torch.randn(2), (4, 4))",
        "    record = make_record('X', {'id': 'base', 'revision': None, 'fingerprint': '0' * 64})",
        "    write_expert(f'library/{name}', [('w', delta)], record)",
        "merge(['library/a', 'library/b', 'library/c'], Average(), 'library/average')",
        f"for words in {commands}: assert main(words.split()) == 0, words",
        "assert not {'lightning', 'transformers', 'datasets'} & set(sys.modules)",
    ]
    python("\n".join(lines), tmp_path)


def test_every_public_name_has_a_home() -> None:
    for name in modular_experts.__all__:
        assert getattr(modular_experts, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Sprse'"):
        modular_experts.Sprse  # noqa: B018


def function_of(verb: str):
    command = VERBS[verb]
    return getattr(importlib.import_module(f"modular_experts.{'.'.join(command.path.split('/'))}"), command.function)


def parameters_of(called) -> dict[str, object]:
    """Return the default of each argument; a dataclass that must be given stands for its fields."""
    hints, found = annotations(called), {}
    for name, parameter in inspect.signature(called).parameters.items():
        found |= parameters_of(hints[name]) if is_dataclass(hints[name]) else {name: parameter.default}
    return found


def test_help_fits_a_screen_with_the_required_options_first_and_examples_last(capsys) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    for verb, command in VERBS.items():
        assert re.search(rf"^  {verb} +{re.escape(command.summary)}$", shown, re.MULTILINE)
    for verb in VERBS:
        assert main([verb, "--help"]) == 0
        shown = capsys.readouterr().out
        options = re.findall(r"^  --([\w.-]+)", shown.partition("\nexamples:")[0], re.MULTILINE)
        if verb in TRAINING:
            needed = ["base", "tasks"]
            of_fit = {"learning_rate", "steps", "batch_size", "modules", "expert"}
            assert (of_fit if verb == "fit" else {"experts", "max_new_tokens"}) <= set(options)
        else:
            parameters = parameters_of(function_of(verb))
            needed = [name for name, default in parameters.items() if default is inspect.Parameter.empty]
            spelt = {name.replace("dry_run", "dry-run").rstrip("_") for name in parameters}
            # What reads rows by `data` is typed by its tasks.
            if "data" in parameters and "tasks" not in parameters:
                spelt = spelt - {"data"} | {"tasks"}
                needed = [name.replace("data", "tasks") for name in needed]
            assert set(options) == {*spelt, "trust", "config", "print_config", "help-all"}
        assert options[: len(needed)] == needed
        assert f"  modular-experts {verb}" in shown.partition("\nexamples:")[2]
        # Every option has a text, on its line or below it.
        assert not re.search(r"^  --\S+( \S+)*\n(?=  --|\n)", shown, re.MULTILINE), verb
        lines = shown.splitlines()
        assert (len(lines) <= 40, max(map(len, lines)) <= 80) == (True, True), verb
