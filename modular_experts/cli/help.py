"""Write the help of a command from its source, so that help needs neither torch nor Lightning.

The signature of a command's function gives the options and their defaults, its docstring their texts, so that help
follows every change of the function. Required options come first; the section `Examples:` ends the screen.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

_ROOT = Path(__file__).parents[1]
_WIDTH, _COLUMN = 120, 32
# Options whose value is a class with settings, by annotation, and what to type after `.help` to see these.
_CLASSES = {"MergeMethod": " NAME", "CoefficientSearch": " NAME", "TaskMixture": "", "Tuning": ""}
# Short names of `fit`, `validate`, `test` and `predict`.
SHORT_NAMES = {
    "base": "model.base",
    "tasks": "data.tasks",
    "expert": "model.expert",
    "modules": "model.modules",
    # `model.experts` gives each pattern of layers its type; elsewhere `--experts` are directories, as they are here.
    "experts": "model.applied",
    "applied": "model.applied",
    "steps": "trainer.max_steps",
    "learning_rate": "model.learning_rate",
    "batch_size": "data.batch_size",
}
# Options of `fit` that are arguments of no class.
OWN_OPTIONS = {
    "--out LIBRARY/NAME": "Directory of the trained expert in a library; its last part is the name.",
    "--overwrite": "Replace an expert.",
}
_EVERYWHERE = {
    "--config FILE": "A YAML file with these options; of several, a later one beats an earlier one.",
    "--print_config": "Print all options as such a file, and do nothing.",
    "--help": "Print this.",
}


class Source(NamedTuple):
    """What a function's source tells its users; options are texts by the option as it is typed."""

    description: str
    required: dict[str, str]
    options: dict[str, str]
    examples: str


def read_source(file: str, name: str, group: str = "", brief: bool = False) -> Source:
    """Read a function or class of the package without importing it.

    Args:
        file: Its file in the package, such as `cli/merge.py`.
        name: Its name.
        group: What stands before an argument's name in its option, such as `model.`.
        brief: Take only the first sentence about each argument, or a line of it.
    """
    tree = ast.parse((_ROOT / file).read_text(encoding="utf-8"))
    found: Any = next(node for node in tree.body if getattr(node, "name", None) == name)
    description, _, rest = (ast.get_docstring(found) or "").partition("\nArgs:\n")
    listed, _, examples = rest.partition("\nExamples:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", listed.partition("\n\n")[0], re.MULTILINE)
    texts = {argument: " ".join(text.split()) for argument, text in entries}
    called = found
    if isinstance(found, ast.ClassDef):
        called = next(node for node in found.body if getattr(node, "name", None) == "__init__")
    wanted = [one for one in called.args.args if one.arg != "self"]
    source = Source(description.strip(), {}, {}, textwrap.dedent(examples).rstrip())
    for place, one in enumerate(wanted, start=len(called.args.defaults) - len(wanted)):
        option, text = f"--{group}{one.arg}", texts[one.arg]
        kind = ast.unparse(one.annotation).removesuffix(" | None")
        shown = {"bool": "", "int": " N", "float": " X", "list[str]": " A [B ...]"}.get(kind)
        if literal := re.match(r"Literal\[(.*)\]", kind):
            shown = " {" + re.sub("[' ]", "", literal[1]) + "}"
        elif shown is None:
            shown = f" {one.arg.rpartition('_')[2].upper()}"
        if brief:
            first = re.split(r"(?<=[.;])(?<!e\.g\.) ", text)[0].rstrip(".;") + "."
            text = textwrap.shorten(first, _WIDTH - _COLUMN, placeholder=" ...")
        if kind in _CLASSES:
            text += f" Its settings: {option}.help{_CLASSES[kind]}"
        if place < 0:
            source.required[option + shown] = text
            continue
        default = ast.unparse(called.args.defaults[place]).replace("'", "")
        source.options[option + shown] = text + f" (default: {default})" * (default not in ("None", "False"))
    return source


def command_help(verb: str, file: str, function: str, summary: str, positional: int) -> str:
    """Return the help of a command that is one function."""
    source = read_source(f"cli/{file}.py", function)
    words = [*source.required, *source.options]
    first = words[:positional]
    usage = [option.split()[0][2:].upper() for option in first] + [one for one in source.required if one not in first]
    sections = {"required": source.required, "options": source.options | _EVERYWHERE}
    return _screen(" ".join([verb, *usage]), source.description, sections, source.examples)


def training_help(verb: str, summary: str) -> str:
    """Return the help of a command that runs a trainer: its own options, and where the trainer's are."""
    model = read_source("training/module.py", "ExpertModule", "model.", brief=True)
    data = read_source("data/mixture.py", "TaskMixture", "data.", brief=True)
    run = {
        "--trainer.OPTION X": "Settings of the Trainer, such as --trainer.max_steps 100; see --help-all.",
        "--ckpt_path FILE": "Checkpoint to go on from, whose settings count unless they are given.",
        "--seed_everything N": "Seed of all random numbers. (default: 0)",
        **_EVERYWHERE,
        "--help-all": "Print every option with its whole text, the trainer's among them.",
    }
    tasks = """--data.tasks '[{"name": "intents", "path": "intents.jsonl"}]'"""
    kind = "--model.expert SparseExpert --model.modules '.*_proj'" if verb == "fit" else "--model.applied library/a"
    config = "configs/fit/sparse.yaml" if verb == "fit" else "configs/test.yaml"
    examples = [
        f"modular-experts {verb} --model.base DIR {kind} \\\n    {tasks}",
        f"modular-experts {verb} --config {config} --model.base DIR",
        f"modular-experts {verb} --model.expert.help SparseExpert",
    ]
    sections = {"required": model.required | data.required, "model": model.options, "data": data.options, "run": run}
    return _screen(verb, f"{summary[0].upper()}{summary[1:]}.", sections, "\n".join(examples))


def _screen(usage: str, description: str, sections: Mapping[str, Mapping[str, str]], examples: str) -> str:
    lines = [f"usage: modular-experts {usage} [options]", "", description]
    for title, rows in sections.items():
        lines += ["", f"{title}:"] if rows else []
        for option, text in rows.items():
            first, others = f"  {option}  ".ljust(_COLUMN), " " * _COLUMN
            lines += textwrap.wrap(text, _WIDTH, initial_indent=first, subsequent_indent=others)
    return "\n".join([*lines, "", "examples:", textwrap.indent(examples, "  ")])
