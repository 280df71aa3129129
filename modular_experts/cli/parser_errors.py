"""Complaints: what a parser says about a command line or a config, as one sentence.

The parser's messages are trees of indented lines: `Parser key "x":` stands above what is wrong with x, and a type that
is a union lists the complaint of each of its members. The complaint that lies deepest came furthest, so that one is
told, with the keys above it as the option's full name.
"""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import ClassVar

__all__ = ["explain", "near", "with_near"]

_KEY = re.compile(r'Parser key "([^"]+)"|^(--[\w.]+): ')
_CLASS = re.compile(r"class_path '([\w.]+)'|(callable class:)")
_UNKNOWN = r"(?:(?:Option|Key) '([\w.]+)' is not (?:accepted|expected)|does not accept option '([\w.]+)')"
_NO_SETTING = _UNKNOWN + r"(; did you mean .*?\?)?"
_RAISED = r"^ +- (?!Expected|Does not validate|Not a valid|Problem with|Invalid content|Import path|Type |a )(.+)"
_EXPECTED = r"Expected an? (?!path but|dot import)(.+?)(?:\. Got value: (.+?))?(?:\. Got value: .*)?$"


def explain(
    message: str,
    options: Sequence[str] = (),
    class_bases: Sequence[type] = (),
    examples: Mapping[str, str] | None = None,
) -> str:
    """Return a parser's message as one sentence that says what is wrong, what was given and what is near.

    Args:
        message: What the parser says.
        options: The option strings it knows, such as `--out`.
        class_bases: Classes whose subclasses may be named.
        examples: How the value of an option is written, where the name of its type does not tell.
    """
    if message.startswith("unrecognized arguments:"):
        return _unrecognized(message.partition(":")[2].split(), options)
    if ambiguous := re.match(r"ambiguous option: (--[\w.]+) could match (--[\w.]+)", message):
        return f"there is no option {ambiguous[1]}; did you mean {ambiguous[2]}?"
    return _Complaint(with_near(message, options), class_bases, examples or {}).sentence()


def near(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return `; did you mean x?`, or nothing where no known name is near."""
    spelt = {word.lower(): word for word in known}
    found = difflib.get_close_matches(name.lower(), list(spelt), n=1, cutoff=cutoff)
    return f"; did you mean {spelt[found[0]]}?" if found else ""


def with_near(message: str, options: Iterable[str]) -> str:
    """Return a message about an option of the parser that knows `options`, with the nearest of them added."""
    found = re.search(_NO_SETTING, message)
    if not found or found[3] or _KEY.search(message):
        return message
    return message + near(found[1] or found[2], [option.lstrip("-") for option in options])


class _Complaint:
    """A message taken apart into lines, each with the full name of the option that it is about."""

    def __init__(self, message: str, class_bases: Sequence[type], examples: Mapping[str, str]) -> None:
        self.message, self.examples = message, examples
        self.bases = [base for base in class_bases if re.search(rf"\b{base.__name__}\b", message)] or class_bases
        self.lines = list(_lines(message, {cls.__name__ for cls in _classes(class_bases)}))

    def sentence(self) -> str:
        """Return the most telling complaint; among those equally deep, the first kind in `_TELLING`."""
        told = [
            (path.count("."), -rank, tell, path.removesuffix(".init_args"), found)
            for path, line in self.lines
            for rank, (pattern, tell) in enumerate(self._TELLING.items())
            if (found := re.search(pattern, line))
        ]
        best = max(told, key=lambda item: item[:2], default=None)
        path = best[3] if best else next((path for path, _ in self.lines), "")
        if path in self.examples and not (best and best[2] is _Complaint._no_setting):
            return f"{path} is written '{self.examples[path]}', got {self._given(path)}"
        if best is None:
            return " ".join(_KEY.sub(r"\1\2", self.message).split())
        return best[2](self, path, best[4])

    def _no_setting(self, path: str, found: re.Match) -> str:
        """Name the option in full. (The path lost its last `init_args`, which stands before a setting of a class.)"""
        full = next(above for above, line in self.lines if found[0] in line)
        option = ".".join(filter(None, [full, found[1] or found[2]])).replace("init_args.", "")
        return f"there is no option '{option}'{found[3] or self._settings()}"

    def _settings(self) -> str:
        """Return what can be set of the class that the message is about, if there is one."""
        named = [cls for cls in _classes(self.bases) if re.search(rf"\b{cls.__name__}\b", self.message)]
        about = [cls for cls in named if cls not in self.bases and not inspect.isabstract(cls)]
        if not about:
            return ""
        kind = max(about, key=lambda cls: len(cls.__name__))
        return f"; {kind.__name__} has {', '.join(inspect.signature(kind).parameters) or 'no settings'}"

    def _required(self, path: str, found: re.Match) -> str:
        return f"{path}{': ' * bool(path)}{found[1]} must be given, on the command line or in --config"

    def _no_attribute(self, path: str, found: re.Match) -> str:
        given = self._given(path)
        if "." in given and not given.startswith(f"{found[1]}."):
            return f"{path}: {given} cannot be imported: {found[0]}"
        names = [name for name, value in vars(sys.modules[found[1]]).items() if inspect.isclass(value)]
        return f"{path}: the module {found[1]} has no class {found[2]!r}{near(found[2], names)}"

    def _unusable(self, path: str, found: re.Match) -> str:
        """Pass on what an import raised."""
        return f"{path}: {self._given(path)} cannot be used: {found[1]}"

    def _no_module(self, path: str, found: re.Match) -> str:
        where = "in the current directory or among those installed"
        return f"{path}: {self._given(path)} cannot be imported: there is no module {found[1]!r} {where}"

    def _no_class(self, path: str, found: re.Match) -> str:
        names = sorted({cls.__name__ for cls in _classes(self.bases) if not inspect.isabstract(cls)})
        known = f" (known: {', '.join(names)})" if 0 < len(names) <= 12 else ""
        known = (
            " (`modular-experts methods` lists them)" if any(b.__name__ == "MergeMethod" for b in self.bases) else known
        )
        own = "a class of your own is named module.Class"
        return f"{path}: there is no class {found[1]!r}{near(found[1], names)}{known}; {own}"

    def _wrong_class(self, path: str, found: re.Match) -> str:
        *cls, base = (group for group in found.groups() if group)
        return f"{path}: {cls[0] if cls else self._given(path)} is no {base}; name a subclass of {base}"

    def _value(self, path: str, found: re.Match) -> str:
        alike = [match for at, line in self.lines if at == path and (match := re.search(_EXPECTED, line))]
        expected, given = [match[1] for match in alike], alike[0][2] or self._given(path)
        choices = [choice for kind in expected if "Literal" in kind for choice in re.findall(r"'([^']*)'", kind)]
        if choices:
            return f"{path} must be one of {', '.join(dict.fromkeys(choices))}, got {given}{near(given, choices)}"
        kinds = [re.sub(r"<class '([\w.]+)'>", r"\1", kind) for kind in expected if "NoneType" not in kind]
        if not kinds or any(kind.startswith("instantiatable class") for kind in kinds):
            written = "{class_path: Name, init_args: {setting: value}}"
            return f"{path}: a class is written as its name or as {written}, got {given}"
        listed = "list" in kinds and not given.startswith(("[", "{"))
        hint = f"; a list is written '[{given}, ...]'" if listed else ""
        return f"{path} must be of type {' or '.join(dict.fromkeys(kinds))}, got {given}{hint}"

    def _given(self, path: str) -> str:
        about = "\n".join(line for at, line in self.lines if at.removesuffix(".init_args") == path)
        kinds = r"Expected a path but (.+) either not|class_path '([\w.]+)'|Given value: (.+)|Got value: (.+)"
        found = re.search(kinds, about)
        return next(group for group in found.groups() if group) if found else "something else"

    # What is looked for in a line -> how it is told.
    _TELLING: ClassVar[dict[str, Callable[[_Complaint, str, re.Match], str]]] = {
        _NO_SETTING: _no_setting,
        r"the following arguments are required: (.+)": _required,
        r"module '([\w.]+)' has no attribute '(\w+)'": _no_attribute,
        r"No module named '([\w.]+)'": _no_module,
        _RAISED: _unusable,
        r"Expected a dot import path string: ([\w.]+)$": _no_class,
        r"Expected '([\w.]+)' to be a subclass of <class '(\w+)'>": _wrong_class,
        r"Import path(?: ([\w.]+))? does not correspond to a subclass of (\w+)": _wrong_class,
        r"\"([\w.]+)\" is not a subclass of (\w+)": _wrong_class,
        _EXPECTED: _value,
    }


def _lines(message: str, known: set[str]) -> Iterator[tuple[str, str]]:
    above: list[tuple[int, list[str]]] = []
    for line in filter(str.strip, message.splitlines()):
        indent = len(line) - len(line.lstrip())
        above = [(at, names) for at, names in above if at < indent]
        names = [found[1] or found[2] for found in _KEY.finditer(line)]
        if (cls := _CLASS.search(line)) and (cls[2] or cls[1].rpartition(".")[2] in known):
            names = ["init_args", *names]
        above.append((indent, names))
        yield ".".join(name for _, names in above for name in names), line


def _classes(bases: Iterable[type]) -> set[type]:
    return {cls for base in bases for cls in ({base} | _classes(base.__subclasses__()))}


def _unrecognized(given: list[str], options: Sequence[str]) -> str:
    wrong = next((item for item in given if item.startswith("-")), given[0])
    option = wrong.partition("=")[0]
    if not wrong.startswith("-"):
        return f"{wrong!r} is one argument too many; options start with --, and a list is written '[a, b]'"
    return f"there is no option {option}{near(option, options)}"
