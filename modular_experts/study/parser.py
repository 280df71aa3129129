"""Make objects of settings with jsonargparse, and turn its reports into one sentence: the cause and a near name."""

import dataclasses
import inspect
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import ArgumentError, ArgumentParser, get_loader, set_parsing_settings

from modular_experts.study.options import ELSEWHERE, UsageError, at_home, unknown
from modular_experts.text import did_you_mean

USUAL = ("modular_experts.ExpertModule", "modular_experts.TaskMixture", "lightning.Trainer")
"""The classes of groups that name none."""
_VALUE = "value"  # the only argument of a parser of one value
load_yaml = get_loader("yaml")
"""Reads YAML in which 1e-3 is a number, as it is in YAML 1.2, and a date is a text."""


def make(option: str, kind: Any, settings: Any) -> Any:
    """Return the object of a type, such as `MergeMethod` or `list[Task]`, that settings describe.

    A name stands for a class that is imported already, a dotted path for any class of the user.

    Raises:
        UsageError: The settings do not fit; the sentence begins with `option`.
    """
    if isinstance(settings, str):
        settings = at_home(settings)
    try:
        parser = parser_of_one(kind)
        return parser.instantiate(parser.parse_object({_VALUE: settings}))[_VALUE]
    except ArgumentError as error:
        raise UsageError(sentence_of(str(error), kind).replace(f"--{_VALUE}", option)) from None


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a command in which a group of the usual class stands without its name, as in configs."""
    return {name: _inner(value) for name, value in settings.items()}


def _inner(group: Any) -> Any:
    is_usual = isinstance(group, Mapping) and group.get("class_path") in USUAL
    return group.get("init_args", {}) if is_usual else group


def refuse_dangerous_imports() -> None:
    """Let jsonargparse refuse settings that name what may run anything, such as `os.system`, before it is imported."""
    set_parsing_settings(import_path_denylist=[])


@cache
def parser_of_one(kind: Any) -> ArgumentParser:
    """Return the parser of one value of a type."""
    refuse_dangerous_imports()
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        # Settings may name a subclass of the user's, such as a form of stored experts.
        set_parsing_settings(subclasses_enabled=[kind])
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument(f"--{_VALUE}", type=kind)
    return parser


class _Line(NamedTuple):
    """A line of a report that tells a cause, with the keys and the classes that stand above it."""

    keys: tuple[str, ...]
    classes: tuple[str, ...]
    text: str
    is_factory: bool


_KEY = re.compile(r'Parser key "([^"]*)":\s*')
_CLASS = re.compile(r"Problem with given class_path '([\w.]+)':")
_FACTORY = re.compile(r"Type .* expects a function or a callable class: ")
# Lines that tell nothing: members of a union that were never meant, and what the report says of itself.
_NOISE = re.compile(
    r"Expected a <class 'NoneType'>|Expected a path |Does not validate|Errors:|Given value|Subtypes:"
    r"|Not a valid subclass|Subclass types expect|a class path \(str\)|a dict with|Expected a List"
    r"|Expected a <class 'list'>$"
)


def _lines(report: str) -> Iterator[_Line]:
    """Yield each line that tells a cause, with the keys and the classes that stand above it, further to the left."""
    above: list[tuple[int, str, str]] = []
    for line in filter(str.strip, report.splitlines()):
        text = line.strip().removeprefix("- ")
        indent = len(line) - len(line.lstrip())
        while above and above[-1][0] >= indent:
            above.pop()
        is_factory = False
        while True:
            if key := _KEY.match(text):
                above.append((indent, "key", key[1]))
                text = text[key.end() :]
            elif kind := _CLASS.match(text):
                above.append((indent, "class", kind[1]))
                text = text[kind.end() :].strip()
            elif factory := _FACTORY.match(text):
                text, is_factory = text[factory.end() :], True
            else:
                break
        if text and not _NOISE.match(text):
            names = {sort: tuple(name for _, its, name in above if its == sort) for sort in ("key", "class")}
            yield _Line(names["key"], names["class"], text, is_factory)


def sentence_of(report: str, hint: Any = None) -> str:
    """Return what a report of jsonargparse refuses as a sentence, with options under their full names."""
    lines = sorted(_lines(report), key=lambda line: -len(line.keys))
    for tell in (_wrong_name, _missing, _wrong_class, _wrong_value):
        for line in lines:
            if sentence := tell(line, report, hint):
                return sentence
    keys = lines[0].keys if lines else _KEY.findall(report)
    option = f"--{'.'.join(keys)}"
    given = re.findall(r"Given value: (?:NestedArg\(key='[^']*', val='?(.*?)'?\)|(.*))$", report, re.MULTILINE)
    subtypes = re.findall(r"Subtypes: \[(.*)\]", report)
    if given and subtypes:
        return _must_be(option, subtypes[-1], given[-1][0] or given[-1][1])
    if hint is not None and not lines:
        return f"{option} must be {_types(str(hint))}, got {report.rpartition('Got value: ')[2]}"
    # Its wording has changed: the innermost line.
    last = lines[0].text if lines else report.strip().splitlines()[-1].strip()
    return f"{option}: {last}" if keys else last


def _wrong_name(line: _Line, report: str, hint: Any) -> str | None:
    refused = re.match(r"Option '([^']+)' is not accepted(?:.*class_path='([\w.]+)')?", line.text)
    if not refused:
        return None
    path = refused[2] or (line.classes[-1] if line.classes else "")
    place = "".join(f"{key}." for key in line.keys)
    settings = _settings_of(path) if path else []
    # The first argument of a factory is given by the package.
    known = [f"--{place}{name}" for name in settings[line.is_factory :]]
    return str(unknown("option", f"--{place}{refused[1]}", known))


def _missing(line: _Line, report: str, hint: Any) -> str | None:
    refused = re.match(r"the following arguments are required: (.*)", line.text)
    refused = refused or re.match(r"Key \"([\w.]+)\" is required", line.text)
    if not refused:
        return None
    names = ["--" + ".".join([*line.keys, name]) for name in refused[1].split(", ")]
    return f"{' and '.join(names)} must be given, on the command line or in --config"


def _wrong_class(line: _Line, report: str, hint: Any) -> str | None:
    option = f"--{'.'.join(line.keys)}"
    if refused := re.match(r"Expected a dot import path string: (.*)", line.text):
        known = {*classes_in(hint)}
        for path in re.findall(r"[\w.]+\w", " ".join(re.findall(r"Subtypes: (.*)", report))):
            known |= {*classes_in(_located(path))} if "." in path else set()
        near = did_you_mean(refused[1], known)
        if not near and option[2:] in ELSEWHERE:
            # Other tools call our `--base DIR` `--model DIR`.
            near = f"; did you mean {ELSEWHERE[option[2:]]}?"
        if not near and known:
            near = f"; there are {', '.join(sorted(known))}, and a class of your own is named module.Class"
        return f"{option}: there is no class {refused[1]!r}{near}"
    words = re.findall(
        r"Expected a path but (.*?) either not accessible|Given value: (.*)|Got value: (.*?)\.?$", report
    )
    word = next(("".join(groups) for groups in words), "")
    text = line.text.partition(". Got value")[0]
    if refused := re.match(r"Import path (?:(.*) )?does not correspond to a subclass of (\w+)", text):
        return f"{option}: {refused[1] or word} is not a subclass of {refused[2]}; name one that is"
    if refused := re.match(
        r"Expected '([\w.]+)' to be (?:a subclass of|a function that returns) <class '(\w+)'>", text
    ):
        return f"{option}: {refused[1]} is not a subclass of {refused[2]}; name one that is"
    if re.match(r"Expected|must ", text) or not re.fullmatch(r"\w+(\.\w+)+", word):
        return None
    if refused := re.search(r"(Importing '[\w.]+' is not allowed)", text):
        return f"{option}: {refused[1].lower()}, because it may run anything; name a class of your own"
    near = ""
    if refused := re.match(r"module '([\w.]+)' has no attribute '(\w+)'", text):
        near = did_you_mean(refused[2], dir(sys.modules[refused[1]]))
    elif refused := re.match(r"No module named '([\w.]+)'", text):
        near = did_you_mean(refused[1], [file.stem for file in Path().glob("*.py")])
    return f"{option}: {word} cannot be imported: {text}{near}"


def _wrong_value(line: _Line, report: str, hint: Any) -> str | None:
    refused = re.match(r"Expected an? (.*?)\. Got value: (.*?)(?:\. Got value: .*)?$", line.text)
    if not refused:
        return None
    return _must_be(f"--{'.'.join(line.keys)}", refused[1], refused[2])


def _must_be(option: str, wanted: str, value: str) -> str:
    literal = re.fullmatch(r"(?:typing\.)?Literal\[([^\]]*)\](?:, <class 'NoneType'>)?", wanted)
    if not literal:
        return f"{option} must be {_types(wanted)}, got {value}"
    known = [word.strip(" '\"") for word in literal[1].split(",")]
    return f"{option} must be one of {', '.join(known)}, got {value}{did_you_mean(value, known)}"


def _types(names: str) -> str:
    """Return types as Python shows them, as words: `<class 'int'>, <class 'NoneType'>` is `of type int`."""
    shown = re.sub(r"<class '([\w.]+)'>", r"\1", names)
    shown = re.sub(r"\b(?:[A-Za-z_]\w*\.)+(\w+)", r"\1", shown)
    members = [name for name in re.split(r", (?![^\[]*\])", shown) if name != "NoneType"]
    return f"of type {' or '.join(members)}"


def classes_in(hint: Any) -> dict[str, Any]:
    """Return the classes that an annotation takes, by name: those in it, and the ones below them."""
    kinds = [hint] if inspect.isclass(hint) and hint.__module__ not in ("builtins", "collections.abc", "torch") else []
    for kind in kinds:
        kinds += kind.__subclasses__()
    found = {kind.__name__: kind for kind in kinds if not inspect.isabstract(kind) and kind.__name__[0] != "_"}
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is Callable:
        # A factory is named by the class that it makes.
        parts = parts[-1:]
    for part in parts:
        found |= classes_in(part)
    return found


def class_at(path: str, option: str) -> Any:
    """Return the class or function at a dotted path; refuse one that settings may not name, before it is imported."""
    refusal = ""
    try:
        parser_of_one(Callable).parse_object({_VALUE: path})
    except ArgumentError as error:
        # Also of a class whose objects cannot be called, which is imported then.
        refusal = str(error)
    found = _located(path)
    if found is None or "is not allowed" in refusal:
        raise UsageError(sentence_of(refusal, Callable).replace(f"--{_VALUE}", option))
    return found


def class_of(option: str, kind: Any, name: str) -> Any:
    """Return the class of a name that an annotation takes, or the one at a dotted path."""
    kinds = classes_in(kind)
    if name in kinds:
        return kinds[name]
    if "." in name:
        found = class_at(name, option)
        if inspect.isclass(found) and issubclass(found, kind):
            return found
        raise UsageError(f"{option}: {name} is not a subclass of {kind.__name__}; name one that is")
    near = did_you_mean(name, kinds) or f"; there are {', '.join(sorted(kinds))}"
    raise UsageError(f"{option}: there is no class {name!r}{near}")


def _located(path: str) -> Any:
    """Return the class at a dotted path that a report shows, which is imported already; else None."""
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)


def _settings_of(path: str) -> list[str]:
    """Return the names of the arguments of a class and of those that it hands them on to."""
    kind = _located(path)
    makers = [vars(owner)["__init__"] for owner in inspect.getmro(kind)[:-1] if "__init__" in vars(owner)]
    names = [name for maker in makers for name in [*inspect.signature(maker).parameters][1:]]
    return [name for name in dict.fromkeys(names) if name not in ("args", "kwargs", "_")]
