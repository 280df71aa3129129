"""Run `modular-experts methods`, which shows the merge methods: their formulas, settings and sources."""

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
    known = {name: getattr(catalogue, name) for name in sorted(catalogue.__all__, key=str.lower)}
    del known["MergeMethod"]
    if name is None:
        table = Table("method", "merged delta of experts with the deltas d_i", box=box.SIMPLE, pad_edge=False)
        for title, kind in known.items():
            text = " ".join(inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0].split())
            table.add_row(title, text.partition(": ")[2] or text)
        Console(markup=False, emoji=False).print(table)
        print("Everything about one: modular-experts methods TIES")
    elif name in known:
        _show(known[name])
    elif "." in name:
        module, _, last = name.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), last)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"{name} cannot be imported: {error}") from error
        if not (inspect.isclass(found) and issubclass(found, MergeMethod)):
            raise ValueError(f"{name} is not a subclass of modular_experts.MergeMethod; give one that is")
        _show(found)
    else:
        hint = did_you_mean(name, known) or f"; the methods are {', '.join(known)}"
        raise ValueError(f"there is no merge method {name!r}{hint}")


def _show(kind: type[MergeMethod]) -> None:
    about, _, settings = inspect.cleandoc(kind.__doc__ or "").partition("Args:")
    print(about.strip())
    print(f"\nSettings:\n{inspect.cleandoc(settings) or '  no settings'}")
    try:
        # A preset fills its settings when it is made.
        made = kind()
    except TypeError:
        print("\nDefaults: some settings have no default")
    else:
        public = {name: value for name, value in vars(made).items() if not name.startswith("_")}
        print(f"\nDefaults: {', '.join(f'{name} {value_text(value)}' for name, value in public.items())}")
    if source := inspect.getdoc(inspect.getmodule(kind)):
        print(f"\nSource:\n{source}")
