"""Write the help of a command from its source, so that help needs neither torch nor Lightning.

A screen of 80 columns and 40 lines holds the first sentence about each option; `--help-all` prints whole texts.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from modular_experts.cli.commands import COMPUTING, DEVICE, Command, help_texts
from modular_experts.study.options import READING

Defined = ast.FunctionDef | ast.ClassDef
_ROOT = Path(__file__).parents[2]
_WIDTH = 80
_COLUMN = 26
_MARGIN = f"{'':{_COLUMN}}"
_Wrapper = partial(textwrap.TextWrapper, break_long_words=False, break_on_hyphens=False)
# Options whose value is a class with settings, by annotation, and what to type after `.help` to see these.
_CLASSES = {"MergeMethod": " NAME", "SearchAlgorithm": " NAME", "TaskMixture": "", "Rows": "", "Tuning": ""}
_METAVARS = {"bool": "", "URL": " URL", "int": " N", "float": " X", "DType": " DTYPE"}
_METAVARS |= {"list[str]": " A [B ...]", "Tasks": " FILE [FILE ...]"}
# `data` is typed by its tasks.
_METAVARS |= dict.fromkeys(("TaskMixture", "Rows"), _METAVARS["Tasks"]) | {"Tuning": ""}
# An argument in a docstring, with its type or without, and the lines of its text.
_ENTRY = r"^ +(\w+)(?: \([^)]*\))?: (.*(?:\n(?! *\w+(?: \([^)]*\))?: ).+)*)"
# What an option means in each command whose docstring does not say more.
_COMMON = {
    "base": "The base's directory or hub id; the one in the experts' records by default.",
    "chat_template": "Put the input as a user's message through the tokenizer's chat template.",
    "dtype": "Data type of the base; bfloat16 takes half the memory.",
    "experts": "Directories of the experts.",
    "max_length": "The most tokens of a row; longer rows lose tokens on the left of the input.",
    "overwrite": "Replace an expert of this name.",
    "quantise": "Form in which the base is quantised, such as nf4.",
    "rows": "The most rows of one task, spread evenly over them.",
    "tasks": "Task files, or tasks with settings, as for `fit`.",
}
_EVERYWHERE = {
    "--trust A [B ...]": "Your modules, whose classes records may name.",
    "--config FILE": "YAML file with options; of several, the last wins.",
    "--print_config": "Print all options as such a file, and do nothing.",
    "--help-all": "Print all options, and their whole texts.",
}


class SourceOption(NamedTuple):
    """An option as a source has it; without a default it must be given."""

    name: str
    kind: str
    default: str | None
    text: str

    def typed(self) -> str:
        """Return the option with its dashes, and a word for its value."""
        # An option such as --for is a word of Python's own.
        name = "tasks" if self.kind in ("TaskMixture", "Rows") else self.name.rstrip("_")
        takes = _METAVARS.get(self.kind, f" {self.name.rpartition('_')[2].upper()}")
        if literal := re.match(r"Literal\[(.*)\]", self.kind):
            takes = " {" + re.sub("[' ]", "", literal[1]) + "}"
        return f"--{name.replace('dry_run', 'dry-run')}{takes}"

    def told(self, whole: bool) -> str:
        """Return the text, or its first sentence, with the default and the place of its settings."""
        text = self.text
        if not whole:
            text = re.split(r"(?<=[.;])(?<!e\.g\.) ", text)[0].rstrip(".;") + "."
        if self.kind in _CLASSES:
            text += f" Its settings: --{self.name}.help{_CLASSES[self.kind]}"
        if self.default is not None and not re.match("None|False|field", self.default):
            text += f" (default: {self.default})"
        return text


class CommandSource(NamedTuple):
    """A function or a dataclass as its source has it; options of dataclasses are among its own."""

    description: str
    options: list[SourceOption]
    examples: str


def command_source(file: Path, name: str) -> CommandSource:
    """Read the source of a function or a dataclass."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    node = next(node for node in tree.body if isinstance(node, Defined) and node.name == name)
    docstring = ast.get_docstring(node) or ""
    description = docstring.partition("\nArgs:\n")[0]
    examples = docstring.partition("\nExamples:\n")[2]
    texts = _COMMON | argument_texts(docstring)
    options: list[SourceOption] = []
    for argument, hint, value in _arguments(node):
        kind = ast.unparse(hint)
        if home := _file_of_group(file, tree, kind):
            options += command_source(home, kind).options
        else:
            default = None if value is None else ast.unparse(value).replace("'", "")
            options.append(SourceOption(argument, kind.removesuffix(" | None"), default, texts[argument]))
    return CommandSource(description.strip(), options, textwrap.dedent(examples).rstrip())


def argument_texts(docstring: str) -> dict[str, str]:
    """Return what a docstring says of each argument."""
    listed = docstring.partition("\nArgs:\n")[2].partition("\n\n")[0]
    entries = re.findall(_ENTRY, listed, re.MULTILINE)
    return {argument: " ".join(text.split()) for argument, text in entries}


def _arguments(node: Defined) -> Iterator[tuple[str, ast.expr, ast.expr | None]]:
    """Yield name, annotation and default of each argument of a function, or of each field of a dataclass."""
    if isinstance(node, ast.ClassDef):
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                yield field.target.id, field.annotation, field.value
        return
    required = len(node.args.args) - len(node.args.defaults)
    for number, argument in enumerate(node.args.args):
        if argument.annotation:
            yield (
                argument.arg,
                argument.annotation,
                node.args.defaults[number - required] if number >= required else None,
            )


def _file_of_group(file: Path, tree: ast.Module, kind: str) -> Path | None:
    """Return the file with the class of an annotation, if that is a dataclass, whose fields are options then."""
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    homes = [f"{node.module}".replace(".", "/") for node in imports if kind in [name.name for name in node.names]]
    home = _ROOT / f"{homes[0]}.py" if homes else file
    is_group = home.is_file() and re.search(
        rf"@dataclass.*\nclass {re.escape(kind)}\b", home.read_text(encoding="utf-8")
    )
    return home if is_group and kind.isidentifier() else None


def options_in_source(verb: str, command: Command) -> list[str]:
    """Return the names of a command's options, as its source has them."""
    options = command_source(_ROOT / f"modular_experts/{command.path}.py", command.function).options
    names = [option.name.rstrip("_") for option in options]
    if "data" in names:
        names += READING
    if verb in COMPUTING:
        names.append("device")
    return [*dict.fromkeys(names)]


def command_help(verb: str, command: Command, whole: bool) -> str:
    """Return the help of a command."""
    if not command.function:
        sections, examples = help_texts(verb)
        return _screen(verb, [f"{command.summary[0].upper()}{command.summary[1:]}."], sections, examples)
    source = command_source(_ROOT / f"modular_experts/{command.path}.py", command.function)
    required = {option.typed(): option.told(whole) for option in source.options if option.default is None}
    options = {option.typed(): option.told(whole) for option in source.options if option.default is not None}
    if whole and verb in COMPUTING:
        options |= DEVICE
    usage = [verb]
    for option in required:
        name, _, words = option.removeprefix("--").partition(" ")
        if name in command.positional:
            usage.append(f"{name.upper()} ..." if "..." in words else name.upper())
        else:
            usage.append(option)
    first, *others = source.description.split("\n\n")
    examples = re.split(r"\n(?=modular-experts)", source.examples)
    if not whole:
        # At first only a paragraph that answers a question is needed beside the first one.
        others = [paragraph for paragraph in others if "?" in paragraph]
        examples = examples[:2]
    return _screen(" ".join(usage), [first, *others], {"required": required, "options": options}, examples)


def class_help(option: str, kind: Any, given_by_us: int = 0) -> str:
    """Return the help on the settings of an imported class, but its first arguments, which the package gives."""
    from jsonargparse import SUPPRESS, ArgumentParser

    parser = ArgumentParser(usage=SUPPRESS, add_help=False)
    parser.add_class_arguments(kind, option, skip={given_by_us}, fail_untyped=False)
    # A file with all of these settings is an option of the parser's own.
    shown = re.sub(r"  --\S+ CONFIG\s+Path to a configuration file\.\n", "", parser.format_help())
    return f"{kind.__name__}\n\n{shown.strip()}"


def list_of_classes(option: str, kinds: Mapping[str, Any]) -> str:
    """Return the names of the classes that an option takes, each with the first line of its docstring."""
    lines = [f"--{option} takes one of these, or module.Class of yours; --{option}.help NAME shows its settings:", ""]
    for name, kind in sorted(kinds.items()):
        summary = (inspect.getdoc(kind) or "").partition("\n")[0].removeprefix(f"{name}: ")
        lines += _Wrapper(_WIDTH, f"  {name:<22}  ", _MARGIN).wrap(summary or "-")
    return "\n".join(lines)


def _screen(
    usage: str, description: Sequence[str], sections: Mapping[str, dict[str, str]], examples: Sequence[str]
) -> str:
    screen = textwrap.wrap(f"usage: modular-experts {usage} [options]", _WIDTH, subsequent_indent="    ")
    for paragraph in description:
        screen += ["", *textwrap.wrap(" ".join(paragraph.split()), _WIDTH)]
    for title, own in sections.items():
        rows = own | _EVERYWHERE if title == "options" else own
        if rows:
            screen += ["", f"{title}:"]
        for option, text in rows.items():
            screen += _Wrapper(_WIDTH, f"  {option}  ".ljust(_COLUMN), _MARGIN).wrap(text)
    screen += ["", "examples:"]
    for example in examples:
        # A line ends only before an option.
        glued = re.sub(r" (?!--)", "\0", re.sub(r" \\\n +", " ", example))
        lines = _Wrapper(_WIDTH - 2, "  ", "      ").wrap(glued)
        screen.append(" \\\n".join(lines).replace("\0", " "))
    return "\n".join(screen)
