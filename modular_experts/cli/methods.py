"""`modular-experts methods`: the merge methods, their formulas, settings and sources."""

from __future__ import annotations

import importlib
import inspect

from rich import box
from rich.console import Console
from rich.table import Table

import modular_experts.methods as catalogue
from modular_experts.cli.format import value_text
from modular_experts.methods import MergeMethod
from modular_experts.text import did_you_mean


def methods(name: str | None = None) -> None:
    """Show the merge methods, or everything about one: formula, properties, settings with their defaults, source.

    Args:
        name: Name of a method, or the dotted path of a class of your own.

    Examples:
        modular-experts methods
        modular-experts methods TIES
    """
    known = {
        known: getattr(catalogue, known) for known in sorted(catalogue.__all__, key=str.lower) if known != "MergeMethod"
    }
    if name is None:
        _list(known)
        return
    if "." in name:
        _show(_own(name))
        return
    if name not in known:
        hint = did_you_mean(name, known) or f"; the methods are {', '.join(known)}"
        raise ValueError(f"there is no merge method {name!r}{hint}")
    _show(known[name])


def _own(path: str) -> type[MergeMethod]:
    """Return a user's class by its dotted path."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{path} cannot be imported: {error}") from error
    if not (inspect.isclass(found) and issubclass(found, MergeMethod)):
        raise ValueError(f"{path} is not a merge method; it must be a subclass of modular_experts.MergeMethod")
    return found


def _list(known: dict[str, type[MergeMethod]]) -> None:
    table = Table("method", "merged delta of experts with the deltas d_i", box=box.SIMPLE, pad_edge=False)
    for name, kind in known.items():
        table.add_row(name, _first_paragraph(kind))
    Console(markup=False, emoji=False).print(table)
    print("Everything about one: modular-experts methods TIES")


def _show(kind: type[MergeMethod]) -> None:
    about, _, settings = inspect.cleandoc(kind.__doc__ or "").partition("Args:")
    print(about.strip())
    print("\nSettings:")
    print(inspect.cleandoc(settings) if settings else "  no settings")
    print(f"\nDefaults: {_defaults(kind)}")
    if source := inspect.getdoc(inspect.getmodule(kind)):
        print(f"\nSource:\n{source}")


def _defaults(kind: type[MergeMethod]) -> str:
    try:
        made = kind()  # presets fill the settings
    except TypeError:
        return "some settings have no default"
    public = {name: value for name, value in vars(made).items() if not name.startswith("_")}
    return ", ".join(f"{name} {value_text(value)}" for name, value in public.items()) or "none"


def _first_paragraph(kind: type[MergeMethod]) -> str:
    text = " ".join(inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0].split())
    return text.partition(": ")[2] or text
