"""Run `methods`, which shows the merge methods, and `interference`, which compares experts before they are merged."""

import inspect
import textwrap
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from modular_experts.cli.format import call_text, share_text, table_of, value_text
from modular_experts.merging.interference import Interference, mean_of_others
from modular_experts.merging.interference import interference as compare
from modular_experts.methods import FIRST, METHODS, MergeMethod, SparseAverage
from modular_experts.methods.method import PROMISES, documentation
from modular_experts.places import check_free
from modular_experts.reports.progress import progress_bar
from modular_experts.study.parser import class_of
from modular_experts.text import depth_of


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
        _show(class_of("name", MergeMethod, name))


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
        entry = f"{setting}: {text}" if text else setting
        print(textwrap.fill(entry, 100, initial_indent="    ", subsequent_indent="        "))
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


def interference(
    experts: list[str],
    method: MergeMethod | None = None,
    out: str | None = None,
    overwrite: bool = False,
    skip: bool = False,
) -> None:
    """Show how experts get in each other's way: where they move the same entries, and where against each other.

    For each expert, overlap is the number of entries that it and another both move over the number that either
    moves; conflict is the share of the shared entries that they move in opposite directions; and distance is how
    far the merge is from the expert, as a share of its energy: 0 is the expert itself, 1 is as far as the base, and
    more is farther. Overlap, conflict and cosine are means over the other experts. These measures predict only
    weakly which expert loses by a merge: on twenty generated tasks, their rank correlations with the loss of exact
    match are about 0.5 at most.

    Args:
        experts: Directories of two or more experts.
        method: The merge whose distance is shown; SparseAverage by default.
        out: A JSON file for all numbers.
        overwrite: Replace that file.
        skip: Leave out experts that cannot be merged. The log names them.

    Examples:
        modular-experts interference library/a library/b
        modular-experts interference --experts library/a library/b --method TIES --out interference.json
    """
    file = check_free(out, overwrite) if out else None
    chosen = method or SparseAverage()
    compared = compare(experts, chosen, progress_bar("comparing"), skip)
    console = Console(markup=False, emoji=False)
    console.print(_experts(compared), _layers(compared))
    print("by chance alone, two experts conflict in 50 % of the entries that both move")
    print("LoRAs and full experts move nearly every entry of a weight, so their overlap is near 100 %")
    print(f"distance is to a merge with {call_text(type(chosen).__name__, vars(chosen))}")
    if file:
        from modular_experts.reports import write_json

        write_json(file, compared.as_dict())
        print(f"all numbers are in {out}")


def _experts(found: Interference) -> Table:
    table = table_of("expert", "norm", "overlap", "conflict", "cosine", "distance")
    sums = found.total
    means = [mean_of_others(pairs) for pairs in (sums.overlap, sums.conflict, sums.cosine)]
    for number, name in enumerate(found.experts):
        overlap, conflict, cosine = (mean[number].item() for mean in means)
        norm = sums.products[number, number].sqrt().item()
        distance = sums.distance[number].item()
        cells = [share_text(overlap), share_text(conflict), f"{cosine:.3f}", f"{distance:.3f}"]
        table.add_row(name, f"{norm:.3g}", *cells)
    return table


def _layers(found: Interference) -> Table:
    table = table_of("layer", "energy", "overlap", "conflict", "cosine", "distance")
    total = found.total.products.trace()
    for name in sorted(found.layers, key=lambda name: (not name, depth_of(f"{name}.weight"), name)):
        sums = found.layers[name]
        energy = (sums.products.trace() / total).item()
        shares = [_mean(mean_of_others(pairs)) for pairs in (sums.overlap, sums.conflict)]
        cells = [share_text(share) for share in (energy, *shares)]
        cells += [f"{_mean(mean_of_others(sums.cosine)):.3f}", f"{_mean(sums.distance):.3f}"]
        depth = depth_of(f"{name}.weight")
        table.add_row("others" if depth is None else str(depth), *cells)
    return table


def _mean(values: Tensor) -> float:
    return values.nanmean().item()
