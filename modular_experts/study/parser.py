"""Make objects of settings with jsonargparse, and turn its reports into one sentence: the cause and a near name."""

import dataclasses
import inspect
import json
import re
import sys
import typing
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, get_loader, set_parsing_settings

from modular_experts.study.options import ELSEWHERE, UsageError, at_home, unknown
from modular_experts.text import did_you_mean

USUAL = ("modular_experts.ExpertModule", "modular_experts.TaskMixture", "lightning.Trainer")
"""The classes of groups that name none."""
_NO_CHOICE = ("builtins", "collections.abc", "pathlib", "torch", "typing")
"""Modules of types whose subclasses nobody names."""
_VALUE = "value"  # the only argument of a parser of one value
load_yaml = get_loader("yaml")
"""Reads YAML in which 1e-3 is a number, as it is in YAML 1.2, and a date is a text."""


class ConfigParser(ArgumentParser):
    """Parser that prints a group of the usual class without its name, as configs are written."""

    def dump(self, cfg: Namespace, *arguments: Any, **how: Any) -> str:
        return yaml.safe_dump(self.settings(cfg, *arguments, **how), sort_keys=False, allow_unicode=True)

    def settings(self, cfg: Namespace, *arguments: Any, **how: Any) -> dict[str, Any]:
        """Return what `dump` writes as YAML."""
        # JSON takes a fifth of YAML's time.
        settings = json.loads(super().dump(cfg, *arguments, **{**how, "format": "json_compact"})) or {}
        for name, group in settings.items():
            if isinstance(group, Mapping) and group.get("class_path") in USUAL:
                settings[name] = group.get("init_args", {})
        return settings


def make(option: str, kind: Any, settings: Any) -> Any:
    """Return the object of a type, such as `MergeMethod` or `list[Task]`, that settings describe.

    A name stands for a class that is imported already, a dotted path for any class of the user.

    Raises:
        UsageError: The settings do not fit; the sentence begins with `option`.
    """
    if isinstance(settings, str):
        settings = at_home(settings)
    try:
        parser = _parser_of_one(kind)
        return parser.instantiate(parser.parse_object({_VALUE: settings}))[_VALUE]
    except ArgumentError as error:
        raise UsageError(sentence_of(str(error), kind).replace(f"--{_VALUE}", option)) from None


def class_of(option: str, kind: Any, name: str) -> Any:
    """Return the class of a name that an annotation takes, or the one at a dotted path."""
    # A name alone that nothing has is refused with near names.
    named = classes_in(kind).get(name) or make(option, type | Callable if "." in name else kind, name)
    if inspect.isclass(kind) and not (inspect.isclass(named) and issubclass(named, kind)):
        raise UsageError(f"{option}: {name} is not a subclass of {kind.__name__}; name one that is")
    return named


def refuse_dangerous_imports() -> None:
    """Let jsonargparse refuse settings that name what may run anything, such as `os.system`, before it is imported."""
    set_parsing_settings(import_path_denylist=[])


@cache
def _parser_of_one(kind: Any) -> ArgumentParser:
    refuse_dangerous_imports()
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        # Settings may name a subclass of the user's, such as a form of stored experts.
        set_parsing_settings(subclasses_enabled=[kind])
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument(f"--{_VALUE}", type=kind)
    return parser


def classes_in(hint: Any) -> dict[str, Any]:
    """Return the classes that an annotation takes, by name: those in it, and the ones below them."""
    kinds = [hint] if inspect.isclass(hint) and hint.__module__ not in _NO_CHOICE else []
    for kind in kinds:
        kinds += kind.__subclasses__()
    classes = {kind.__name__: kind for kind in kinds if not inspect.isabstract(kind) and kind.__name__[0] != "_"}
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is Callable:
        # A factory is named by the class that it makes.
        parts = parts[-1:]
    for part in parts:
        classes |= classes_in(part)
    return classes


# In a report, keys and classes stand above the lines that tell causes, further to the left:
#
#     Parser key "method":
#       Does not validate against any of the Union subtypes
#       Subtypes: [<class 'modular_experts.methods.method.MergeMethod'>, <class 'NoneType'>]
#       Errors:
#         - Problem with given class_path 'modular_experts.TIES':
#             Option 'kep' is not accepted
#         - Expected a <class 'NoneType'>
#       Given value: NestedArg(key='kep', val='0.1')
_ABOVE = re.compile(
    r'Parser key "(?P<key>[^"]*)":\s*|Problem with given class_path \'(?P<kind>[\w.]+)\':\s*'
    r"|Type (?P<factory>\S.*) expects a function or a callable class: "
)
# Lines that tell no cause: members of a union that were never meant, and what the report says of itself.
_NOISE = re.compile(
    r"Does not validate|Subtypes:|Errors:|Given value|Subclass types expect|a class path \(str\)|a dict with"
    r"|Expected a path |Not a valid subclass of \w+$|Expected (?:(?!Got value|dot import|to be|subclass).)*$"
)


class _Cause(NamedTuple):
    """A line that tells what is wrong, with the option, and the class or the factory whose setting it is about."""

    option: str
    kind: str
    text: str
    factory: str

    def depth(self) -> int:
        """Return how far inside it lies; that a class is another member of a union tells less than all others."""
        return -1 if "correspond to a subclass" in self.text else self.option.count(".")


def _causes(report: str) -> list[_Cause]:
    """Return what a report refuses, the innermost first."""
    above: list[tuple[int, re.Match[str]]] = []
    causes = []
    for line in filter(str.strip, report.splitlines()):
        indent = len(line) - len(line.lstrip())
        above = [(column, match) for column, match in above if column < indent]
        above += [(indent, match) for match in _ABOVE.finditer(line)]
        text = _ABOVE.sub("", line).strip(" -")
        if text and not _NOISE.match(text):
            keys, kinds = ([match[part] for _, match in above if match[part]] for part in ("key", "kind"))
            factory = above[-1][1]["factory"] if above else ""
            causes.append(_Cause("--" + ".".join(keys), kinds[-1] if kinds else "", text, factory or ""))
    return sorted(causes, key=_Cause.depth, reverse=True)


def sentence_of(report: str, hint: Any = None) -> str:
    """Return what a report refuses as a sentence, with options under their full names; else its innermost line."""
    causes = _causes(report)
    if not causes:
        # No member of a union takes the value.
        keys = [match["key"] for match in _ABOVE.finditer(report) if match["key"]]
        return _must_be(f"--{'.'.join(keys)}", re.findall(r"Subtypes: \[(.*)\]", report)[-1], _value_in("", report))
    cause = causes[0]
    option, text, value = cause.option, cause.text, _value_in(cause.text, report)
    place = f"{option}." if option != "--" else option
    if refused := re.match(r"Option '([^']+)' is not accepted(?:.*class_path='([\w.]+)')?", text):
        kind = refused[2] or cause.kind
        if cause.factory.endswith(f".{kind.rpartition('.')[2]}]"):
            return f"{place}{refused[1]} is a setting of a class; name the class before it, with {option}"
        known = _settings_of(kind)
        if cause.factory:
            # The package gives its first argument.
            del known[0]
        return str(unknown("option", place + refused[1], [place + name for name in known]))
    if refused := re.match(r"the following arguments are required: (.*)|Key \"([\w.]+)\" is required", text):
        names = (refused[1] or refused[2]).split(", ")
        return f"{' and '.join(place + name for name in names)} must be given, on the command line or in --config"
    if refused := re.match(r"Multiple subclasses with name (\w+)\. .*ambiguity: (.*)\.", cause.text):
        return f"{option}: several classes have the name {refused[1]}; name one of {refused[2]}"
    if refused := re.match(r"Expected a dot import path string: (.*)", text):
        return f"{option}: there is no class {refused[1]!r}{_near_class(option, refused[1], report, hint)}"
    if refused := re.match(r"(?:Expected an?|Not a valid subclass of) (.*?)\. Got value: ", text):
        return _must_be(option, refused[1], value)
    if refused := re.search(r"(?:subclass of|function that returns) (?:<class ')?(\w+)", text):
        return f"{option}: {value} is not a subclass of {refused[1]}; name one that is"
    if "is not allowed, denied by" in text:
        return f"{option}: importing '{value}' is not allowed, because it may run anything; name a class of your own"
    if re.fullmatch(r"\w+(\.\w+)+", value):
        return f"{option}: {value} cannot be imported: {text.partition('. Got value')[0]}{_near_attribute(text)}"
    return f"{option}: {text}" if option != "--" else text


def _value_in(text: str, report: str) -> str:
    """Return the value that a cause names, or else the innermost one of the report, as it was typed."""
    path = re.search(r"(?:Expected|Import path|Importing) '?(\w+(?:\.\w+)+)'? (?:to be|does not|is not)", text)
    value = path or re.search(r"Got value: (.*?)(?:\. Got value: .*)?$", text)
    value = value or re.search(r"Given value: (?:NestedArg\(key='[^']*', val='?)?(.*?)(?:'?\))?$", report, re.MULTILINE)
    return value[1] if value else ""


def _near_class(option: str, name: str, report: str, hint: Any) -> str:
    known = {*classes_in(hint)}
    for path in re.findall(r"[\w.]+\.\w+", " ".join(re.findall(r"Subtypes: (.*)", report))):
        known |= {*classes_in(_located(path))}
    if near := did_you_mean(name, known):
        return near
    if option[2:] in ELSEWHERE:
        # Other tools call our `--base DIR` `--model DIR`.
        return f"; did you mean {ELSEWHERE[option[2:]]}?"
    if not known:
        return ""
    return f"; there are {', '.join(sorted(known))}, and a class of your own is named module.Class"


def _near_attribute(text: str) -> str:
    missing = re.match(r"module '([\w.]+)' has no attribute '(\w+)'", text)
    if missing:
        return did_you_mean(missing[2], dir(sys.modules[missing[1]]))
    missing = re.match(r"No module named '([\w.]+)'", text)
    return did_you_mean(missing[1], [file.stem for file in Path().glob("*.py")]) if missing else ""


def _must_be(option: str, wanted: str, value: str) -> str:
    literal = re.fullmatch(r"(?:typing\.)?Literal\[([^\]]*)\](?:, <class 'NoneType'>)?", wanted)
    if literal:
        known = [word.strip(" '\"") for word in literal[1].split(",")]
        return f"{option} must be one of {', '.join(known)}, got {value}{did_you_mean(value, known)}"
    # Python shows a type as `<class 'int'>` and by its module.
    shown = re.sub(r"\b(?:[A-Za-z_]\w*\.)+(\w+)", r"\1", re.sub(r"<class '([\w.]+)'>", r"\1", wanted))
    types = [name for name in re.split(r", (?![^\[]*\])", shown) if name != "NoneType"]
    return f"{option} must be of type {' or '.join(types)}, got {value}"


def _located(path: str) -> Any:
    """Return the class at a dotted path that a report shows, which is imported already; else None."""
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)


def _settings_of(path: str) -> list[str]:
    """Return the names of the arguments of a class and of those that it hands them on to; none if it is not known."""
    makers = makers_of(_located(path) or object)
    names = [name for maker in makers for name in [*inspect.signature(maker).parameters][1:]]
    return [name for name in dict.fromkeys(names) if name not in ("args", "kwargs", "_")]


def makers_of(kind: type) -> list[Callable[..., None]]:
    """Return the `__init__` of a class and of those that it hands its arguments on to."""
    return [vars(owner)["__init__"] for owner in inspect.getmro(kind)[:-1] if "__init__" in vars(owner)]
