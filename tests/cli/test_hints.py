"""Every hint that names a command or an option names one that exists, and commands in hints can be run.

Hints are all strings of the package: the sentences of errors and logs, help texts and docstrings. A placeholder of an
f-string counts as a word.
"""

import ast
import contextlib
import functools
import inspect
import io
import re
import shlex
from pathlib import Path

import pytest
from lightning.pytorch import Trainer

import modular_experts
from modular_experts.__main__ import VERBS, main
from modular_experts.cli.commands import options_of_run
from modular_experts.cli.help import options_in_source
from modular_experts.cli.merge import Tuning
from modular_experts.data import TaskMixture
from modular_experts.training.module import ExpertModule

PACKAGE = Path(modular_experts.__file__).parent
GROUPS: dict[str, type] = {"model": ExpertModule, "data": TaskMixture, "trainer": Trainer, "tune": Tuning}
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


def names_of(verb: str) -> set[str]:
    """Return the options of a command."""
    command = VERBS[verb]
    return {*(options_in_source(verb, command) if command.function else options_of_run(verb))}


NAMES = {verb: names_of(verb) for verb in VERBS}


@functools.cache
def settings_of(kind: type) -> set[str]:
    """Return the names of the arguments of a class and of those above it."""
    makers = [vars(owner)["__init__"] for owner in kind.__mro__ if "__init__" in vars(owner)]
    return {name for maker in makers for name in inspect.signature(maker).parameters}


def exists(option: str, verbs: list[str]) -> bool:
    """Return whether one of the commands has an option; settings of a class that is named belong to the class."""
    name = option.replace("-", "_").removesuffix("+")
    head, _, rest = name.partition(".")
    if name in {known.replace("-", "_") for known in EVERYWHERE} or name.endswith("help"):
        return True
    group = GROUPS.get(head)
    is_setting = not rest or group is None or rest.partition(".")[0] in settings_of(group)
    return is_setting and any(head in NAMES[verb] for verb in verbs)


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
        known = settings_of(GROUPS[group])
        found += [f"{group}.{name}"] if name not in known and (group, name) not in ATTRIBUTES else []
    return found


# Names of weights and attributes in texts that are no settings.
ATTRIBUTES = {("model", name) for name in ("layers", "embed_tokens", "safetensors", "norm", "generate")}
ATTRIBUTES |= {("model", "sig")}  # the file of a signature
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
        words = shlex.split(re.split(" <| >>?", line)[0])[1:]
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
