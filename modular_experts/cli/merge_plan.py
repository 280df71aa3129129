"""The plan of a merge on the command line: what a dry run shows, and which methods are told of afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from modular_experts.cli.format import call_text
from modular_experts.merger.estimate import WeightEstimate, estimate, largest, seconds
from modular_experts.merger.merged import Merged, describe
from modular_experts.methods import MergeMethod
from modular_experts.text import bytes_text, in_any_block

__all__ = ["method_text", "tell_methods", "tell_plan"]


def tell_plan(merged: Merged) -> None:
    """Print which method each weight gets, what will be read and held, and about how long it will take."""
    weights = estimate(merged)
    table = Table("weight", "shape", "method", "experts", "to read", "memory", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in table.columns[3:]:
        column.justify = "right"
    for row in _rows(weights):
        table.add_row(*row)
    Console(markup=False, emoji=False).print(table)
    for number, text in enumerate(dict.fromkeys(method_text(weight.method) for weight in weights), 1):
        print(f"method {number}: {text}")
    for line in _kept(merged):
        print(line)
    most = largest(weights)
    print(
        f"{len(weights)} weights of {len(merged.experts)} experts, {bytes_text(sum(w.read for w in weights))} to read"
    )
    print(f"memory beside Python's own: about {bytes_text(most.peak)}, for {most.name}")
    print(f"time: about {_duration(seconds(merged, weights))}, as a few of the weights took; nothing was written")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def tell_methods(merged: Merged) -> None:
    """Print which methods merged how many weights, and how many stay at the base."""
    count = len(merged.experts)
    experts = f"{count} {'expert' if count == 1 else 'experts'}"
    texts = [method_text(method) for method in merged.rules.values()]
    for text in dict.fromkeys(texts):
        number = texts.count(text)
        weights = "" if number == len(texts) else f" in {number} {'weight' if number == 1 else 'weights'}"
        print(f"merged {experts} with {text}{weights}")
    for line in _kept(merged):
        print(line)


def _kept(merged: Merged) -> Iterable[str]:
    kept = sorted({name for expert in merged.experts for name in expert} - set(merged))
    if kept:
        others = " and others" if len(kept) > 1 else ""
        yield f"{len(kept)} {'weights stay' if others else 'weight stays'} at the base: {kept[0]}{others}"


def method_text(method: MergeMethod) -> str:
    """Return a method with its settings in one line."""
    return call_text(type(method).__name__, _plain(describe(method)["init_args"]))


def _rows(weights: Sequence[WeightEstimate]) -> Iterable[Sequence[str]]:
    """Return the cells of each row; weights that differ in the number of their layer alone share one."""
    groups: dict[Any, list[WeightEstimate]] = {}
    numbers = {text: n for n, text in enumerate(dict.fromkeys(method_text(weight.method) for weight in weights), 1)}
    for weight in weights:
        key = (in_any_block(weight.name), weight.shape, method_text(weight.method))
        groups.setdefault(key, []).append(weight)
    for (name, shape, method), members in groups.items():
        few = min(weight.experts for weight in members)
        many = max(weight.experts for weight in members)
        yield (
            f"{len(members)} x {name}" if len(members) > 1 else members[0].name,
            " x ".join(map(str, shape)),
            f"{numbers[method]}: {method.partition('(')[0]}",
            str(few) if few == many else f"{few} to {many}",
            bytes_text(sum(weight.read for weight in members)),
            bytes_text(max(weight.peak for weight in members)),
        )


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings with nested methods as text."""
    return {
        name: value["class_path"].rpartition(".")[2] if isinstance(value, dict) and "class_path" in value else value
        for name, value in settings.items()
    }
