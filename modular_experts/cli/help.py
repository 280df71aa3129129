"""Write the help of a command from its source, so that help needs neither torch nor Lightning.

A command's function is found in its file by its name. Its arguments become options, required ones first; the section
`Examples:` of its docstring ends the screen.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

__all__ = ["Argument", "arguments_of", "command_help", "training_help"]

_ROOT = Path(__file__).parents[1]
_WIDTH, _COLUMN = 100, 26
_CLASSES = ("MergeMethod", "CoefficientSearch", "TaskMixture", "Tuning")
_EVERYWHERE = {
    "--config FILE": "A YAML file with these options; several may be given, and a later one beats an earlier one.",
    "--print_config": "Print all options as such a file, and do nothing.",
    "--help": "Print this.",
}


class Argument(NamedTuple):
    """An argument of a function: its annotation and default as they are written (None without one), and its text."""

    name: str
    annotation: str
    default: str | None
    text: str

    def row(self, prefix: str = "--") -> tuple[str, str]:
        """Return the option as it is typed, and its help."""
        kind = re.sub(r" \| None$", "", self.annotation)
        shown, text = f"{prefix}{self.name}", self.text
        if literal := re.match(r"Literal\[(.*)\]", kind):
            choices = literal[1].replace("'", "").replace('"', "").split(", ")
            shown += f" {{{','.join(choices)}}}" if len(choices) < 4 else f" {choices[0]}"
            text += f" One of {', '.join(choices)}." if len(choices) > 3 else ""
        elif kind == "list[str]":
            shown += " A [B ...]"
        elif kind != "bool":
            shown += {"int": " N", "float": " X"}.get(kind, f" {self.name.rpartition('_')[2].upper()}")
        if named := [name for name in _CLASSES if re.search(rf"\b{name}\b", kind)]:
            text += f" Its settings: {prefix}{self.name}.help" + " NAME" * (named[0] not in _CLASSES[2:])
        if self.default not in (None, "None", "False", "field(default_factory=dict)"):
            text += f" (default: {self.default})".replace("'", "")
        return shown, text


def arguments_of(file: str, name: str) -> tuple[str, list[Argument], str]:
    """Return the description, the arguments and the examples of a function or class, without importing it.

    Args:
        file: Its file in the package, such as `cli/merge.py`.
        name: Its name.
    """
    tree = ast.parse((_ROOT / file).read_text(encoding="utf-8"))
    found = next(node for node in tree.body if getattr(node, "name", None) == name)
    assert isinstance(found, ast.FunctionDef | ast.ClassDef)
    called = found
    if isinstance(found, ast.ClassDef):
        called = next(node for node in found.body if getattr(node, "name", None) == "__init__")  # type: ignore[assignment]
    assert isinstance(called, ast.FunctionDef)
    documented = ast.get_docstring(found) or ""
    description, _, rest = documented.partition("\nArgs:\n")
    listed, _, examples = rest.partition("\nExamples:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", listed.partition("\n\n")[0], re.MULTILINE)
    texts = {argument: " ".join(text.split()) for argument, text in entries}
    wanted = [argument for argument in called.args.args if argument.arg != "self"]
    defaults = [None] * (len(wanted) - len(called.args.defaults)) + [ast.unparse(one) for one in called.args.defaults]
    arguments = [
        Argument(one.arg, ast.unparse(one.annotation) if one.annotation else "", default, texts.get(one.arg, ""))
        for one, default in zip(wanted, defaults, strict=True)
    ]
    return inspect.cleandoc(description), arguments, textwrap.dedent(examples).rstrip()


def command_help(verb: str, file: str, function: str, summary: str, positional: int) -> str:
    """Return the help of a command that is one function."""
    description, arguments, examples = arguments_of(f"cli/{file}.py", function)
    description = description or summary
    first = [argument.name.upper() for argument in arguments[:positional]]
    needed = [argument for argument in arguments if argument.default is None]
    usage = " ".join([f"usage: modular-experts {verb}", *first])
    usage += "".join(f" {argument.row()[0]}" for argument in needed if argument.name.upper() not in first)
    others = [argument.row() for argument in arguments if argument.default is not None]
    return _screen(
        f"{usage} [options]",
        description,
        {"required": [argument.row() for argument in needed], "options": [*others, *_EVERYWHERE.items()]},
        examples,
    )


def training_help(verb: str, what: str) -> str:
    """Return the help of a command that runs a trainer: its own options, and where the trainer's are."""
    sections: dict[str, list[tuple[str, str]]] = {"required": []}
    for title, file, name in (
        ("model", "training/module.py", "ExpertModule"),
        ("data", "data/mixture.py", "TaskMixture"),
    ):
        arguments = arguments_of(file, name)[1]
        sections["required"] += [one.row(f"--{title}.") for one in arguments if one.default is None]
        sections[title] = [one.row(f"--{title}.") for one in arguments if one.default is not None]
    sections["run"] = [
        (
            "--trainer.OPTION X",
            "Settings of the Trainer, such as --trainer.max_steps 100; see --help-all.",
        ),
        ("--ckpt_path FILE", "Checkpoint to go on from, whose settings count unless they are given."),
        ("--seed_everything N", "Seed of all random numbers. (default: 0)"),
        *_EVERYWHERE.items(),
        ("--help-all", "Print every option, the trainer's among them."),
    ]
    tasks = """--data.tasks '[{"name": "intents", "path": "intents.jsonl"}]'"""
    kind = "--model.expert SparseExpert --model.modules '.*_proj'" if verb == "fit" else "--model.applied library/a"
    config = "configs/fit/sparse.yaml" if verb == "fit" else "configs/test.yaml"
    examples = [
        f"modular-experts {verb} --model.base DIR {kind} \\\n    {tasks}",
        f"modular-experts {verb} --config {config} --model.base DIR",
    ]
    if verb == "fit":
        examples.append("modular-experts fit --model.expert.help SparseExpert")
    return _screen(f"usage: modular-experts {verb} [options]", what, sections, "\n".join(examples))


def _screen(usage: str, description: str, sections: Mapping[str, list[tuple[str, str]]], examples: str) -> str:
    lines = [usage, "", description]
    for title, rows in sections.items():
        if rows:
            lines += ["", f"{title}:", *(line for row in rows for line in _wrapped(*row))]
    return "\n".join([*lines, "", "examples:", textwrap.indent(examples, "  ")])


def _wrapped(option: str, text: str) -> Iterator[str]:
    """Yield the lines of an option and its help, in two columns."""
    lines = textwrap.wrap(text, _WIDTH - _COLUMN)
    if len(option) > _COLUMN - 4:
        yield f"  {option}"
    elif lines:
        yield f"  {option:<{_COLUMN - 2}}{lines.pop(0)}"
    yield from (f"{'':<{_COLUMN}}{line}" for line in lines)
