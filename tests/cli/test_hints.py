"""Every hint that names a command or an option names one that exists, and commands in hints can be run.

Hints are all strings of the package: the sentences of errors and logs, help texts and docstrings. A placeholder of an
f-string counts as a word.
"""

import ast
import contextlib
import functools
import importlib
import inspect
import io
import re
import shlex
from pathlib import Path

import pytest
from lightning.pytorch import Trainer

import modular_experts
from modular_experts.__main__ import VERBS, main
from modular_experts.cli.commands import COMPUTING
from modular_experts.cli.training import FIT_ALONE
from modular_experts.data import TaskMixture
from modular_experts.settings import READING, SHORT_NAMES
from modular_experts.settings.read import arguments_of, kinds_of
from modular_experts.training.module import ExpertModule

PACKAGE = Path(modular_experts.__file__).parent
GROUPS = {"model": ExpertModule, "data": TaskMixture, "trainer": Trainer}
EVERYWHERE = {"help", "help-all", "config", "print_config", "version", "trust"}
# Programs of others.
STRANGERS = ("hf ", "pip ", "mergekit-yaml", "python -m", "torchrun", "make ")


@functools.cache
def texts() -> list[tuple[str, str]]:
    """Return each string of the package with its file; of an f-string, placeholders become the word X."""
    found = []
    # These have options of SLURM's commands and of other servers.
    strangers = {PACKAGE / "study" / "slurm_jobs.py", PACKAGE / "interop" / "servers.py"}
    for file in sorted(set(PACKAGE.rglob("*.py")) - strangers):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                words = [part.value if isinstance(part, ast.Constant) else "X" for part in node.values]
                found.append((file.name, "".join(words)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
                found.append((file.name, node.value))
    return found


def hints_of(verb: str) -> dict[str, object]:
    """Return the type of each option of a command."""
    command, device = VERBS[verb], {"device": str} if verb in COMPUTING else {}
    if command.function:
        module = importlib.import_module(f"modular_experts.{command.path.replace('/', '.')}")
        hints = arguments_of(getattr(module, command.function))[0] | device
        # An argument such as `for_` is the option `--for`.
        short = {name: kinds_of(full, hints)[0] for name, full in READING.items() if kinds_of(full, hints)}
        return short | {name.rstrip("_"): hint for name, hint in hints.items()}
    found = dict(GROUPS) | device | {"ckpt_path": str, "seed_everything": int}
    found |= {name: kinds_of(full, found)[0] for name, full in SHORT_NAMES.items()}
    return found | dict.fromkeys(FIT_ALONE if verb == "fit" else (), str)


HINTS = {verb: hints_of(verb) for verb in VERBS}


def exists(option: str, verbs: list[str]) -> bool:
    """Return whether one of the commands has an option; settings of a class that is named belong to the class."""
    name = option.replace("-", "_").removesuffix("+")
    head, _, rest = name.partition(".")
    if name in {one.replace("-", "_") for one in EVERYWHERE} or name.endswith("help"):
        return True
    for hints in (HINTS[verb] for verb in verbs):
        if head not in hints:
            continue
        kinds = kinds_of(head, hints)
        group = next((kind for kind in kinds if inspect.isclass(kind) and kind in (*GROUPS.values(), Tuning)), None)
        if not rest or group is None or rest.partition(".")[0] in arguments_of(group)[0]:
            return True
    return False


Tuning = importlib.import_module("modular_experts.cli.merge").Tuning


def wrong_hints(text: str) -> list[str]:
    """Return the options and commands in a text that do not exist."""
    found = []
    for part in re.split(r"`|\n\s*(?=modular-experts)", text):
        # In a command, options belong to the command; in a sentence, to any command.
        command = re.match(r"\s*(?:modular-experts ([a-z]+)|([a-z]+)(?= --))", part)
        verb = (command[1] or command[2]) if command else ""
        if verb not in ("", *VERBS) and "modular-experts" in part and "`" in text:
            found.append(f"modular-experts {verb}")
        if any(stranger in part for stranger in STRANGERS):
            continue
        for option in re.findall(r"(?<![\w-])(?<!var\()--([a-z][a-z0-9_.+-]*[a-z0-9_])(?![A-Z:\w])", part):
            found += [] if exists(option, [verb] if verb in VERBS else list(VERBS)) else [f"--{option}"]
    for group, name in re.findall(r"(?<![\w.\-/(])(model|data|trainer)\.([a-z_]+)(?![\w(./])", text):
        known = arguments_of(GROUPS[group])[0]
        found += [f"{group}.{name}"] if name not in known and (group, name) not in ATTRIBUTES else []
    return found


# Names of weights and attributes in texts that are no settings.
ATTRIBUTES = {("model", name) for name in ("layers", "embed_tokens", "safetensors", "norm", "generate")}
ATTRIBUTES |= {("trainer", name) for name in ("validate", "test")}


def test_every_option_and_command_that_a_text_names_exists() -> None:
    wrong = [(file, hint) for file, text in texts() for hint in wrong_hints(text)]
    assert not wrong


@pytest.mark.parametrize(
    "text",
    [
        "give --overwite",
        "`merge --ckpt_path x`",
        "`modular-experts show --out x`",
        "`modular-experts merg a`",
        "set data.batchsize",
        "--trainer.stepz 3",
    ],
)
def test_a_wrong_hint_is_found(text: str) -> None:
    assert wrong_hints(text)


def commands() -> set[str]:
    """Return the whole commands of the package's texts: those in backticks and the examples of docstrings."""
    found = set()
    for _, text in texts():
        found |= set(re.findall(r"`(modular-experts [a-z]+ [^`]+)`", text))
        for example in re.findall(r"^ +(modular-experts [a-z]+ .*(?:(?<=\\)\n.*)*)", text, re.MULTILINE):
            found.add(" ".join(example.replace("\\\n", " ").split()))
    return {one for one in found if not one.endswith("\\") and "..." not in one}


def test_the_commands_of_hints_and_examples_can_be_parsed(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["modular-experts"])
    found = sorted(commands())
    assert len(found) > 30
    for line in found:
        words = shlex.split(re.split(" <| >>", line)[0])[1:]
        if "--config" in words or any(word.endswith((".help", "--help")) for word in words):
            continue
        written = io.StringIO()
        with contextlib.redirect_stdout(written), contextlib.redirect_stderr(written):
            try:
                code = main([*words, "--print_config"])
            except SystemExit as leaving:
                code = leaving.code
        # A hint may leave out what the reader has typed before.
        assert code in (0, None) or "must be given" in written.getvalue(), f"{line}: {written.getvalue()[-300:]}"
