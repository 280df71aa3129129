"""Write the help of a command from its source, so that help needs neither torch nor Lightning.

The signature of a command's function gives the options and their defaults, its docstring their texts, so that help
follows every change of the function. A screen of 80 columns and 40 lines holds the required options first, the first
sentence about each of the others, and examples at the end; `--help-all` prints whole texts. The command `completion`
takes the options from there.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from modular_experts.cli.commands import VERBS, Command
from modular_experts.settings.read import arguments_of

_ROOT = Path(__file__).parents[1]
_WIDTH, _COLUMN = 80, 26
# Options whose value is a class with settings, by annotation, and what to type after `.help` to see these.
_CLASSES = {"MergeMethod": " NAME", "SearchAlgorithm": " NAME", "TaskMixture": "", "Tuning": ""}
_METAVARS = {"bool": "", "int": " N", "float": " X"}
_METAVARS |= {"list[str]": " A [B ...]", "Tasks": " FILE [FILE ...]"}
_METAVARS |= {"DType": " DTYPE"}
# An argument in a docstring, with its type or without, and the lines of its text.
_ENTRY = r"^ +(\w+)(?: \([^)]*\))?: (.*(?:\n(?! *\w+(?: \([^)]*\))?: ).+)*)"
# Both spellings work; the help shows the usual one.
_HYPHENS = {"dry_run": "dry-run"}
OWN_OPTIONS = {
    "--out LIBRARY/NAME": "Directory of the expert; without it, none is kept.",
    "--overwrite": "Replace an expert.",
    "--gate-of A [B ...]": "Train gates of stored experts, for Phatgoose.",
    "--dry-run": "Only print what it would do, and the time and memory.",
}
"""Options of `fit` that are arguments of no class, and their texts."""
_EVERYWHERE = {
    # The option by which experts with routers and plans of one's own open (`library/described.py`).
    "--trust A [B ...]": "Your modules, whose classes records may name.",
    "--config FILE": "YAML file with options; of several, the last wins.",
    "--print_config": "Print all options as such a file, and do nothing.",
    "--help-all": "Print all options, and their whole texts.",
}


class Source(NamedTuple):
    """What a function's source tells its users; options are texts by the option as it is typed."""

    description: str
    required: dict[str, str]
    options: dict[str, str]
    examples: str


def read_source(file: str, name: str, group: str = "", brief: bool = False) -> Source:
    """Read a function or class of a file of the package, such as `cli/merge.py`, without importing it.

    In an option, `group` stands before an argument's name. With `brief`, its text is the first sentence alone.
    """
    tree = ast.parse((_ROOT / file).read_text(encoding="utf-8"))
    found: Any = next(node for node in tree.body if getattr(node, "name", None) == name)
    description, _, rest = (ast.get_docstring(found) or "").partition("\nArgs:\n")
    listed, _, examples = rest.partition("\nExamples:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", listed.partition("\n\n")[0], re.MULTILINE)
    texts = {argument: " ".join(text.split()) for argument, text in entries}
    source = Source(description.strip(), {}, {}, textwrap.dedent(examples).rstrip())
    for argument, kind, default in _arguments(found):
        if home := _file_of_options(tree, kind):
            inner = read_source(home, kind, group, brief)
            source.required.update(inner.required)
            source.options.update(inner.options)
            continue
        option, text = f"--{group}{_HYPHENS.get(argument, argument)}", texts[argument]
        shown = _METAVARS.get(kind, f" {argument.rpartition('_')[2].upper()}")
        if literal := re.match(r"Literal\[(.*)\]", kind):
            shown = " {" + re.sub("[' ]", "", literal[1]) + "}"
        if brief:
            text = re.split(r"(?<=[.;])(?<!e\.g\.) ", text)[0].rstrip(".;") + "."
        if kind in _CLASSES:
            text += f" Its settings: {option}.help{_CLASSES[kind]}"
        if default is None:
            source.required[option + shown] = text
        else:
            source.options[option + shown] = text + f" (default: {default})" * (default not in ("None", "False"))
    return source


def _file_of_options(tree: ast.Module, kind: str) -> str | None:
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and kind in [one.name for one in node.names]:
            file = f"{(node.module or '').partition('.')[2].replace('.', '/')}.py"
            if (_ROOT / file).is_file() and f"class {kind}(Options)" in (_ROOT / file).read_text(encoding="utf-8"):
                return file
    return None


def _arguments(found: ast.FunctionDef | ast.ClassDef) -> list[tuple[str, str, str | None]]:
    """Return the name, the type and the default (None without one) of each argument of a function or a class."""
    function: Any = found
    if isinstance(found, ast.ClassDef):
        function = next((node for node in found.body if getattr(node, "name", None) == "__init__"), None)
    if function:
        taken = [one for one in function.args.args if one.arg != "self"]
        defaults = [None] * (len(taken) - len(function.args.defaults)) + function.args.defaults
        given = [(one.arg, one.annotation, default) for one, default in zip(taken, defaults, strict=True)]
    else:  # a dataclass
        fields: Any = [node for node in found.body if isinstance(node, ast.AnnAssign)]
        given = [(node.target.id, node.annotation, node.value) for node in fields]
    return [
        (name, ast.unparse(kind).removesuffix(" | None"), default and ast.unparse(default).replace("'", ""))
        for name, kind, default in given
    ]


def command_help(verb: str, command: Command, whole: bool) -> str:
    """Return the help of a command that is one function."""
    source = read_source(f"{command.path}.py", command.function, brief=not whole)
    usage = []
    for option in source.required:
        name = option.partition(" ")[0][2:]
        usage.append(name.upper() + " ..." * ("..." in option) if name in command.positional else option)
    sections = {"required": source.required, "options": source.options, "": _EVERYWHERE}
    paragraphs, examples = source.description.split("\n\n"), re.split(r"\n(?=modular-experts)", source.examples)
    if not whole:
        # If there are two paragraphs or more, only one that answers a question is needed at first.
        paragraphs = [one for place, one in enumerate(paragraphs) if not place or "?" in one]
    return _screen(" ".join([verb, *usage]), paragraphs, sections, examples if whole else examples[:2])


def training_help(verb: str, summary: str) -> str:
    """Return the help of a command that runs a trainer: the options with short names, and where the others are."""
    data = read_source("data/mixture.py", "TaskMixture", brief=True)
    rows = next(text for option, text in data.options.items() if option.startswith("--batch_size"))
    files = [("Sparse", "sparse"), ("Masked", "masked"), ("LoRA", "lora"), ("Full", "full")]
    rates = [f"{name}Expert {_learning_rate(file):g}" for name, file in files]
    required = {
        "--base PLACE": "Directory or hub id of the model.",
        "--tasks FILE [FILE ...]": "Task files, such as a.jsonl b.csv; a task is named after its file.",
    }
    kind = {
        "--expert TYPE": "SparseExpert, LoRAExpert, FullExpert, MaskedExpert, ..., or module.Class of yours; "
        "--expert.NAME X is a setting of it, and --expert.help TYPE lists them.",
        "--modules A [B ...]": "Layers with an expert: ends of names (q_proj), patterns, or all-linear.",
    }
    options = {"--applied A [B ...]": "Experts to add to the base first; also --experts."}
    if verb == "fit":
        required |= kind
        training = {
            "--steps N": "Optimizer steps; without a length, 3 epochs.",
            "--learning_rate X": f"Peak rate (default: {', '.join(rates)}).",
            "--batch_size N": rows,
        }
        options = OWN_OPTIONS | training | options
    run = {
        "--ckpt_path FILE": "Checkpoint to go on from; settings that are given beat its own.",
        "--seed_everything N": "Seed of all random numbers. (default: 0)",
        "--trainer.NAME X": "Settings of the Trainer; --help-all lists them and all others.",
    }
    line = f"modular-experts {verb} --base DIR --tasks a.jsonl"
    examples = [f"{line} --experts library/a", f"modular-experts {verb} --config configs/test.yaml"]
    if verb == "fit":
        more = "--expert SparseExpert --modules q_proj v_proj"
        examples = [
            f"{line} {more} --steps 100 --out library/a",
            "modular-experts fit --config configs/fit/sparse.yaml --steps 20",
            "modular-experts fit --expert.help SparseExpert",
        ]
    sections = {"required": required, "options": options, "": run | _EVERYWHERE}
    return _screen(verb, [f"{summary[0].upper()}{summary[1:]}."], sections, examples)


def class_help(prefix: str, kind: Any, given_by_us: int = 0) -> str:
    """Return the help on the settings of a class that is imported: what stands in its docstring, and the defaults.

    Each name follows a prefix, such as `--method.`; the first `given_by_us` arguments are left out.
    """
    hints, defaults = arguments_of(kind, given_by_us)
    texts: dict[str, str] = {}
    for one in reversed(inspect.getmro(kind)):
        for documented in (one, vars(one).get("__init__")):
            doc = inspect.cleandoc(getattr(documented, "__doc__", None) or "")
            for name, text in re.findall(_ENTRY, doc, re.MULTILINE):
                # The length of a run is ours.
                texts[name] = re.sub(r"(max_epochs\s*=\s*)1000", r"\g<1>3", " ".join(text.split()))
    summary = (inspect.getdoc(kind) or "").partition("\n\n")[0]
    lines = [*textwrap.wrap(f"{kind.__name__}: {summary}", _WIDTH), ""]
    for name, default in defaults.items():
        text = texts.get(name, "")
        text += "" if default in (None, False, inspect.Parameter.empty) else f" (default: {default})"
        lines += textwrap.wrap(
            f"  {prefix}{name} {_METAVARS.get(getattr(hints[name], '__name__', ''), ' X').strip()}  {text}",
            _WIDTH,
            subsequent_indent=" " * 6,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def _learning_rate(file: str) -> float:
    source = (_ROOT / "experts" / f"{file}.py").read_text(encoding="utf-8")
    return float(re.search(r"learning_rate: ClassVar\[float\] = (\S+)", source)[1])  # type: ignore[index]


def _screen(
    usage: str, description: Sequence[str], sections: Mapping[str, Mapping[str, str]], examples: Sequence[str]
) -> str:
    screen = textwrap.wrap(f"usage: modular-experts {usage} [options]", _WIDTH, subsequent_indent=" " * 4)
    for paragraph in description:
        screen += ["", *textwrap.wrap(" ".join(paragraph.split()), _WIDTH)]
    for title, rows in sections.items():
        screen += (["", f"{title}:"] if title else []) if rows else []
        for option, text in rows.items():
            first, others = f"  {option}  ".ljust(_COLUMN), " " * _COLUMN
            screen += textwrap.wrap(
                text, _WIDTH, initial_indent=first, subsequent_indent=others, break_on_hyphens=False
            )
    screen += ["", "examples:"]
    for example in examples:
        line = " "
        for part in re.split(r"(?: \\\n)? +(?=--)", example):
            if len(f"{line} {part}") > _WIDTH - 2:
                screen.append(f"{line} \\")
                line = "     "
            line = f"{line} {part}"
        screen.append(line)
    return "\n".join(screen)


_SCRIPT = """\
_modular_experts() {
  local word=${COMP_WORDS[COMP_CWORD]} words=
  if [ "$COMP_CWORD" = 1 ]; then
    words="%s"
  elif [[ $word == -* ]]; then
    case ${COMP_WORDS[1]} in
%s
    esac
  else
    COMPREPLY=($(compgen -f -- "$word"))
    return
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}
complete -o filenames -F _modular_experts modular-experts"""


def completion(shell: Literal["bash", "zsh"]) -> None:
    """Print a script for a shell's start-up file, which completes commands, options and paths.

    Args:
        shell: The shell that reads the script.

    Examples:
        modular-experts completion bash >> ~/.bashrc
        modular-experts completion zsh >> ~/.zshrc
    """
    cases = []
    for verb, command in VERBS.items():
        shown = command_help(verb, command, True) if command.function else training_help(verb, command.summary)
        options = re.findall(r"^  (--[\w-]+)", shown.partition("\nexamples:")[0], re.MULTILINE)
        cases.append(f'      {verb}) words="{" ".join(options)}" ;;')
    if shell == "zsh":
        print("autoload -U +X compinit bashcompinit && compinit && bashcompinit")
    print(_SCRIPT % (" ".join(VERBS), "\n".join(cases)))
