"""Write the help of a command from its source, so that help needs neither torch nor Lightning.

A screen of 80 columns and 40 lines holds the first sentence about each option; `--help-all` prints whole texts.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from modular_experts.cli.commands import COMPUTING, DEVICE, VERBS, Command, help_texts
from modular_experts.study.options import READING

_ROOT = Path(__file__).parents[2]
_WIDTH, _COLUMN = 80, 26
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


def _read_source(file: Path, name: str, whole: bool, required: dict[str, str], options: dict[str, str]) -> list[str]:
    """Return the description and the examples of a function; add the texts of its options, as these are typed."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found: Any = next(node for node in tree.body if getattr(node, "name", None) == name)
    description, _, rest = (ast.get_docstring(found) or "").partition("\nArgs:\n")
    listed, _, examples = rest.partition("\nExamples:\n")
    texts = _COMMON | _texts(listed.partition("\n\n")[0])
    for argument, annotation, default in _arguments(found):
        if home := _file_of_group(file, tree, annotation):
            _read_source(home, annotation, whole, required, options)
            continue
        kind = annotation.removesuffix(" | None")
        name, text = argument.replace("dry_run", "dry-run").rstrip("_"), texts[argument]
        option = "--tasks" if kind in ("TaskMixture", "Rows") else f"--{name}"
        shown = _METAVARS.get(kind, f" {argument.rpartition('_')[2].upper()}")
        if literal := re.match(r"Literal\[(.*)\]", kind):
            shown = " {" + re.sub("[' ]", "", literal[1]) + "}"
        if not whole:
            text = re.split(r"(?<=[.;])(?<!e\.g\.) ", text)[0].rstrip(".;") + "."
        if kind in _CLASSES:
            text += f" Its settings: --{name}.help{_CLASSES[kind]}"
        if default is None:
            required[option + shown] = text
        else:
            tells = not re.match("None|False|field", default)
            options[option + shown] = text + f" (default: {default})" * tells
    return [description.strip(), textwrap.dedent(examples).rstrip()]


def _texts(doc: str) -> dict[str, str]:
    return {name: " ".join(text.split()) for name, text in re.findall(_ENTRY, doc, re.MULTILINE)}


def _file_of_group(file: Path, tree: ast.Module, kind: str) -> Path | None:
    """Return the file with the class of an annotation, if that is a dataclass, whose fields are options then."""
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    homes = [f"{node.module}".replace(".", "/") for node in imports if kind in [name.name for name in node.names]]
    home = _ROOT / f"{homes[0]}.py" if homes else file
    is_group = home.is_file() and re.search(rf"@dataclass.*\nclass {kind}\b", home.read_text(encoding="utf-8"))
    return home if is_group and kind.isidentifier() else None


def options_in_source(verb: str, command: Command) -> list[str]:
    """Return the names of a command's options, as its source has them."""

    def names(file: Path, name: str) -> list[str]:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        defined = next(node for node in tree.body if getattr(node, "name", None) == name)
        listed = []
        for argument, annotation, _ in _arguments(defined):
            home = _file_of_group(file, tree, annotation)
            listed += names(home, annotation) if home else [argument.rstrip("_")]
        return listed

    found = names(_ROOT / f"modular_experts/{command.path}.py", command.function)
    reading = [*READING] if "data" in found else []
    device = ["device"] if verb in COMPUTING else []
    return [*dict.fromkeys([*found, *reading, *device])]


def _arguments(found: Any) -> list[tuple[str, str, str | None]]:
    if isinstance(found, ast.ClassDef):
        fields: list[Any] = [node for node in found.body if isinstance(node, ast.AnnAssign)]
        given = [(one.target.id, one.annotation, one.value) for one in fields]
    else:
        values = [None] * (len(found.args.args) - len(found.args.defaults)) + found.args.defaults
        given = [(one.arg, one.annotation, value) for one, value in zip(found.args.args, values, strict=True)]
    return [(name, ast.unparse(kind), value and ast.unparse(value).replace("'", "")) for name, kind, value in given]


def command_help(verb: str, command: Command, whole: bool) -> str:
    """Return the help of a command."""
    if not command.function:
        summary, (sections, examples) = command.summary, help_texts(verb)
        return _screen(verb, [f"{summary[0].upper()}{summary[1:]}."], sections, examples)
    sections = {"required": {}, "options": {}}
    home = _ROOT / f"modular_experts/{command.path}.py"
    description, example = _read_source(home, command.function, whole, **sections)
    sections["options"] |= DEVICE if whole and verb in COMPUTING else {}
    usage = []
    for option in sections["required"]:
        name = option.partition(" ")[0][2:]
        usage.append(name.upper() + " ..." * ("..." in option) if name in command.positional else option)
    first, *others = description.split("\n\n")
    examples = re.split(r"\n(?=modular-experts)", example)
    # At first only a paragraph that answers a question is needed beside the first one.
    paragraphs = [first, *(one for one in others if whole or "?" in one)]
    return _screen(" ".join([verb, *usage]), paragraphs, sections, examples if whole else examples[:2])


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
        lines += _Wrapper(_WIDTH, f"  {name:<22}  ", " " * _COLUMN).wrap(summary or "-")
    return "\n".join(lines)


def _screen(
    usage: str, description: Sequence[str], sections: Mapping[str, Mapping[str, str]], examples: Sequence[str]
) -> str:
    screen = textwrap.wrap(f"usage: modular-experts {usage} [options]", _WIDTH, subsequent_indent=" " * 4)
    for paragraph in description:
        screen += ["", *textwrap.wrap(" ".join(paragraph.split()), _WIDTH)]
    for title, rows in {**sections, "options": {**sections["options"], **_EVERYWHERE}}.items():
        screen += ["", f"{title}:"] if rows else []
        for option, text in rows.items():
            first, others = f"  {option}  ".ljust(_COLUMN), " " * _COLUMN
            screen += _Wrapper(_WIDTH, first, others).wrap(text)
    screen += ["", "examples:"]
    for example in examples:
        # A line ends only before an option.
        glued = re.sub(r" (?!--)", "\0", re.sub(r" \\\n +", " ", example))
        lines = _Wrapper(_WIDTH - 2, "  ", " " * 6).wrap(glued)
        screen.append(" \\\n".join(lines).replace("\0", " "))
    return "\n".join(screen)


def completion(shell: Literal["bash", "zsh"]) -> None:
    """Print a line for a shell's start-up file, by which it completes commands, options and paths.

    Args:
        shell: The shell that reads the line.

    Examples:
        modular-experts completion bash >> ~/.bashrc
        modular-experts completion zsh >> ~/.zshrc
    """
    shown = "\n".join(command_help(verb, command, True) for verb, command in VERBS.items())
    words = [*VERBS, *dict.fromkeys(re.findall(r"^  (--[\w-]+)", shown, re.MULTILINE))]
    start = "autoload -U +X compinit bashcompinit && compinit && bashcompinit\n" * (shell == "zsh")
    print(f"{start}complete -o default -W '{' '.join(words)}' modular-experts")
