"""Run `modular-experts methods`, which shows the merge methods: their formulas, settings and sources."""

import inspect
import textwrap
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from modular_experts.cli.format import value_text
from modular_experts.methods import FIRST, METHODS, MergeMethod
from modular_experts.methods.method import PROMISES, documentation
from modular_experts.settings.read import class_named


def methods(name: str | None = None, all: bool = False) -> None:
    """Show the merge methods to try first, or everything about one: formula, properties, settings, source.

    Args:
        name: Name of a method, or the dotted path of a class of your own.
        all: Show all methods, in the order of their names.

    Examples:
        modular-experts methods
        modular-experts methods TIES
    """
    if name is None:
        by_name = sorted(METHODS, key=str.lower)
        _list({"all methods": by_name} if all else FIRST)
        more = "" if all else f"All {len(METHODS)} methods: modular-experts methods --all\n"
        print(f"{more}Everything about one: modular-experts methods TIES")
    else:
        _show(class_named("name", [MergeMethod], name)[0])


def _list(groups: Mapping[str, Sequence[str]]) -> None:
    table = Table("method", "merged delta of experts with the deltas d_i", box=box.SIMPLE, pad_edge=False)
    for need, names in groups.items():
        if len(groups) > 1:
            table.add_row()
            table.add_row("", f"{need}:", style="bold")
        for name in names:
            text = " ".join(documentation(METHODS[name])[0].split("\n\n")[0].split())
            table.add_row(name, text.partition(": ")[2] or text)
    Console(markup=False, emoji=False).print(table)


def _show(kind: type[MergeMethod]) -> None:
    about, settings = documentation(kind)
    print(f"{about}\n\n{textwrap.fill(PROMISES, 100)}\n\nSettings:")
    for setting, text in settings.items() or [("no settings", "")]:
        print(
            textwrap.fill(
                f"{setting}: {text}" if text else setting, 100, initial_indent="    ", subsequent_indent=" " * 8
            )
        )
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
