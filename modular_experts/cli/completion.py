"""Print what lets a shell complete commands, and an editor complete and check config files."""

import importlib
import inspect
import json
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from modular_experts.cli.command import unknown_command
from modular_experts.cli.commands import VERBS, importing, options_of_run
from modular_experts.cli.help import argument_texts, options_in_source
from modular_experts.cli.words import annotations, hint_at, members_of
from modular_experts.study.options import READING, SHORT_NAMES
from modular_experts.study.parser import classes_in, makers_of

_JSON_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", Path: "string", type(None): "null"}
_BASH = """\
_modular_experts() {{
  local words="{verbs}"
  if (( COMP_CWORD > 1 )); then
    case "${{COMP_WORDS[1]}}" in
{options}
    esac
    case "${{COMP_WORDS[COMP_CWORD-1]}}" in
{values}
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _modular_experts modular-experts"""


def completion(program: Literal["bash", "zsh", "jsonschema"], command: str = "fit") -> None:
    """Print what completes commands in a shell, or configs in an editor.

    `bash` and `zsh` print lines for the shell's start-up file; the shell then completes commands, options, names of
    classes and paths. `jsonschema` prints a JSON schema of a command's configs; an editor with a YAML plugin completes
    and checks a config that begins with `# yaml-language-server: $schema=fit.json`.

    Args:
        program: The program that reads the text.
        command: The command whose configs the JSON schema describes.

    Examples:
        modular-experts completion bash >> ~/.bashrc
        modular-experts completion jsonschema study > study.json
    """
    if command not in VERBS:
        raise unknown_command(command)
    if program == "jsonschema":
        print(json.dumps(config_schema(command), indent=1))
        return
    if program == "zsh":
        print("autoload -U +X compinit bashcompinit && compinit && bashcompinit")
    options = {verb: [f"--{name}" for name in _options(verb)] for verb in VERBS}
    values: dict[str, set[str]] = {}
    for verb in VERBS:
        for name, hint in _hints(verb).items():
            values.setdefault(f"--{name}", set()).update(_names(hint))
    cases = {option: sorted(names) for option, names in values.items() if names}
    print(_BASH.format(verbs=" ".join(VERBS), options=_cases(options), values=_cases(cases)))


def _options(verb: str) -> list[str]:
    command = VERBS[verb]
    return options_in_source(verb, command) if command.function else options_of_run(verb)


def _hints(verb: str) -> dict[str, Any]:
    """Return the annotations of a command's options, under the names that configs have."""
    command = VERBS[verb]
    with importing():
        # It imports the classes that options name.
        importlib.import_module("modular_experts.study.lightning")
        module = importlib.import_module(f"modular_experts.{command.path.replace('/', '.')}")
    short = READING
    if command.function:
        hints = annotations(getattr(module, command.function))
        for group in [hint for hint in hints.values() if hasattr(hint, "__dataclass_fields__")]:
            hints |= annotations(group)
    else:
        hints = module.option_hints()
        short = SHORT_NAMES
    named = {name: hints.get(f"{name}_", hints.get(name)) for name in _options(verb)}
    for name in short.keys() & named.keys():
        if named[name] is None:
            named[name] = hint_at(short[name], hints)
    return named


def _names(hint: Any) -> list[str]:
    """Return the words that an annotation takes: of a `Literal`, or names of classes."""
    words = [str(word) for member in members_of(hint) if get_origin(member) is Literal for word in get_args(member)]
    kinds = classes_in(hint)
    # A single class is never named, because only its settings differ.
    return [*words, *kinds] if len(kinds) > 1 else words


def _cases(words: Mapping[str, Sequence[str]]) -> str:
    return "\n".join(f'      {word}) words="{" ".join(inner)}" ;;' for word, inner in words.items())


def config_schema(verb: str) -> dict[str, Any]:
    """Return the JSON schema of the config files of a command."""
    schema = _Schema()
    properties = {name: schema.of(hint) for name, hint in _hints(verb).items()}
    # What YAML's anchors repeat may stand under a key such as `x-common`.
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"config of modular-experts {verb}",
        "type": "object",
        "properties": {"$schema": {}} | properties,
        "patternProperties": {"^x-": {}, r"\+$": {}},
        "additionalProperties": False,
        "$defs": schema.definitions,
    }


class _Schema:
    """Schemas of annotations; each class has its own definition, because settings of one may name another."""

    def __init__(self) -> None:
        self.definitions: dict[str, Any] = {}

    def of(self, hint: Any) -> dict[str, Any]:
        """Return the schema of an annotation; what it does not know may be anything."""
        origin, inner = get_origin(hint), get_args(hint)
        if hint in _JSON_TYPES:
            # Editors read YAML 1.1, in which 1e-3 is a text.
            return {"type": ["number", "string"] if hint is float else _JSON_TYPES[hint]}
        if origin is Literal:
            return {"enum": [*inner]}
        if origin in (Union, types.UnionType):
            return {"anyOf": [self.of(member) for member in inner]}
        if origin in (list, tuple, Sequence):
            return {"type": "array", "items": self.of(inner[0]) if origin is list else {}}
        if origin in (dict, Mapping):
            return {"type": "object", "additionalProperties": self.of(inner[1])}
        kinds = classes_in(hint)
        if not kinds or any(kind.__module__.startswith("torch.nn") for kind in kinds.values()):
            return {}
        return self._of_classes(kinds)

    def _of_classes(self, kinds: Mapping[str, Any]) -> dict[str, Any]:
        """Return the schema of a class: its name, its settings, or a class of the user's at a dotted path."""
        path = {"type": "string", "pattern": r"^\w+(\.\w+)+$"}
        settings = [self._settings_of(name, kind) for name, kind in sorted(kinds.items())]
        foreign = {"type": "object", "required": ["class_path"], "properties": {"class_path": path}}
        return {"anyOf": [{"enum": sorted(kinds)}, path, *settings, foreign]}

    def _settings_of(self, name: str, kind: Any) -> dict[str, Any]:
        if name not in self.definitions:
            # One of its settings may be of the same class.
            self.definitions[name] = {}
            texts = argument_texts(inspect.getdoc(kind) or "")
            settings: dict[str, Any] = {}
            for maker in makers_of(kind):
                for setting, hint in _annotations(maker).items():
                    described = {"description": texts[setting]} if setting in texts else {}
                    settings.setdefault(setting, self.of(hint) | described)
            # Settings may stand beside the class, too.
            own = {"class_path": {"const": name}, "init_args": {"$ref": f"#/$defs/{name}"}, "dict_kwargs": {}}
            properties = settings | own
            self.definitions[name] = {"type": "object", "properties": properties, "additionalProperties": False}
        return {"$ref": f"#/$defs/{name}"}


def _annotations(maker: Callable[..., None]) -> dict[str, Any]:
    """Return the annotations of arguments; all are Any where a package imports their types for checkers alone."""
    try:
        return annotations(maker)
    except (AttributeError, TypeError):
        return dict.fromkeys([*inspect.signature(maker).parameters][1:], Any)
