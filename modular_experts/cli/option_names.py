"""Refuse misspelt options of `fit`, `validate`, `test` and `predict` before torch and Lightning are imported.

A slip then costs half a second instead of seven. The names come from the source of the classes that have the options.
Only what is surely a slip is refused here, because another name is near; the parser, which knows every type, judges all
else.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from modular_experts.discovery import SYSTEMS
from modular_experts.settings import OWN_OPTIONS, SHORT_NAMES, UsageError
from modular_experts.settings.arguments import ELSEWHERE, Option, as_typed, no_option
from modular_experts.text import did_you_mean, nearest

_PACKAGE = Path(__file__).parents[1]
# Arguments of the trainer's methods, and what every command takes.
OTHERS = {
    *("ckpt_path", "weights_only", "verbose", "return_predictions", "seed_everything"),
    *("config", "print_config", "help", "help_all", "trust"),
}


def check_option_names(verb: str, words: Sequence[str]) -> None:
    """Raise a `UsageError` for the first option, or type of expert, that does not exist and is near one that does."""
    lightning = find_spec("lightning")
    classes = {
        "model": (_PACKAGE / "training/module.py", "ExpertModule"),
        "data": (_PACKAGE / "data/mixture.py", "TaskMixture"),
        "trainer": (Path(str(lightning and lightning.origin)).parent / "pytorch/trainer/trainer.py", "Trainer"),
    }
    groups = {group: arguments_in(*place) for group, place in classes.items()}
    own = re.findall(r"--([\w-]+)", " ".join(OWN_OPTIONS)) if verb == "fit" else []
    known = [f"--{name.replace('-', '_')}" for name in (*SHORT_NAMES, *groups, *own, *sorted(OTHERS))]
    for place, word in enumerate(words):
        typed, equals, value = word.partition("=")
        head, _, rest = typed.replace("-", "_")[2:].partition(".")
        head, field = head.removesuffix("+"), rest.partition(".")[0].removesuffix("+")
        fields = [f"--{head}.{name}" for name in groups.get(head, ())]
        if not word.startswith("--"):
            continue
        if f"--{head}" not in known:
            if head in ELSEWHERE or nearest(typed, known, 0.8):
                raise no_option(typed, known)
        elif field and fields and f"--{head}.{field}" not in fields and nearest(f"--{head}.{field}", fields, 0.8):
            sentence = str(no_option(f"--{head}.{field}", fields))
            raise UsageError(as_typed(sentence, [Option(f"{head}.{field}", None, typed)], SHORT_NAMES))
        elif head == "expert" and not rest:
            name = value if equals else " ".join(words[place + 1 : place + 2])
            rooms = [_PACKAGE / room / "__init__.py" for room in ("experts", "routing")]
            rooms += SYSTEMS.glob("*/__init__.py")
            kinds = re.findall(r'"(\w+Expert)"', "".join(room.read_text(encoding="utf-8") for room in rooms))
            if name.isidentifier() and name not in kinds and (near := did_you_mean(name, kinds)):
                raise UsageError(f"{typed}: there is no class {name!r}{near}")


def arguments_in(file: Path, name: str) -> list[str]:
    """Return the arguments of a class, read from its source; empty if there is no such file."""
    if not file.is_file():
        return []
    tree = ast.parse(file.read_text(encoding="utf-8"))
    (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    (made,) = (node for node in found.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    return [one.arg for one in (*made.args.args, *made.args.kwonlyargs) if one.arg != "self"]
