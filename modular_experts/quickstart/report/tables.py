"""Tables of the report: the numbers of a run as HTML, in the order in which the page asks its questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modular_experts.quickstart.report.markup import Html, element, table
from modular_experts.quickstart.report.reading import (
    KIND_NAMES,
    METHOD_NAMES,
    At,
    Reading,
    number,
    percent,
    share,
    size,
    times,
)

__all__ = ["levels_table", "merges_table", "roles_table", "settings_table", "singles_table", "tasks_table"]

KEYS = {"Average": "key average", "SparseAverage": "key overlap", "TIES": "key ties", "TaskArithmetic": "key"}


def singles_table(reading: Reading) -> Html:
    """Return how good single experts of each kind are, and what one of them costs."""
    head = ["", "exact match", "Rouge-L", "loss", "kept", "ever touched", "trained numbers", "on disk", "seconds"]
    rows = []
    for kind in reading.kinds:
        scores = {name: reading.single(kind, name) for name in ("exact_match", "rougeL", "loss")}
        shares = [share(reading.single(kind, name)) for name in ("kept", "ever_trained")]
        cost = [size(reading.single(kind, "bytes")), number(reading.single(kind, "seconds"), 1)]
        rows.append(_row(KIND_NAMES[kind], _scores(scores), [*shares, _trained(reading, kind), *cost]))
    return table(head, [rows])


def levels_table(reading: Reading, at: At) -> Html:
    """Return the exact match on the held-in tasks by kind, method, and number of merged experts."""
    head = ["", "single", *[f"{level} in one" for level in reading.levels]]
    groups = []
    for kind in reading.kinds:
        rows = [_title(KIND_NAMES[kind], [_bar(reading.single(kind))], len(reading.levels))]
        for method in reading.methods(kind):
            cells = [_bar(reading.merged(kind, method, at=at, level=level)) for level in reading.levels]
            rows.append(_row(_method(method), [element("td"), *cells]))
        groups.append(rows)
    return table(head, groups)


def merges_table(reading: Reading) -> Html:
    """Return the merges of all experts: at scale 1, at the chosen scale, and what they cost."""
    over = {"": 1, "scale 1": 2, "chosen scale": 5, "as an expert": 3}
    head = ["", "held-in", "held-out", "", "held-in", "held-out", "Rouge-L", "loss", "kept", "on disk", "seconds"]
    groups = []
    for kind in reading.kinds:
        rows = [_title(KIND_NAMES[kind], [], len(head) - 1)]
        for method in reading.methods(kind):
            merge = reading.merge(kind, method)
            plain, chosen = merge["default"], merge["chosen"]
            cells = [*_both(plain), element("td", times(merge["scale"])), *_both(chosen)]
            others = [percent(chosen["held_in"]["rougeL"]), number(chosen["held_in"]["loss"], 3)]
            cost = [share(merge["kept"]), size(merge["bytes"]), number(merge["seconds"], 2)]
            rows.append(_row(_method(method), cells, [*others, *cost]))
        groups.append(rows)
    return table(head, groups, over)


def roles_table(reading: Reading) -> Html:
    """Return held-in beside held-out: the base, the best merge of each kind, and multitask."""
    base = reading.results["base"]
    merges = []
    for kind in reading.kinds:
        method = reading.best(kind)
        name = f"{KIND_NAMES[kind]}, {METHOD_NAMES[method]}"
        merges.append(_row(name, _both(reading.merge(kind, method)["chosen"])))
    marks = [_row("base, as it is", _both(base["plain"])), _row("base, own format", _both(base["latent"]))]
    groups = [marks, merges, [_row("multitask", _both(reading.results["multitask"]))]]
    return table(["", "held-in", "held-out"], groups)


def tasks_table(reading: Reading) -> Html:
    """Return each task's single experts: exact match and loss, by kind."""
    names = [KIND_NAMES[kind] for kind in reading.kinds]
    rows = []
    for task in reading.tasks():
        found = [reading.results["experts"][kind][task] for kind in reading.kinds]
        losses = [number(expert["loss"], 3) for expert in found]
        rows.append(_row(task, [_bar(expert["exact_match"]) for expert in found], losses))
    return table(["", *names, *names], [rows], {"": 1, "exact match": len(names), "loss": len(names)})


def settings_table(results: Mapping[str, Any]) -> Html:
    """Return seed, versions and settings of the run."""
    facts = {"seed": results["seed"], "Python": results["python"], "machine": results["machine"]}
    base = {name.replace("_", " "): value for name, value in results["base"].items() if not isinstance(value, Mapping)}
    groups = [facts, results["versions"], {f"base: {name}": value for name, value in base.items()}, results["plan"]]
    rows = [[_row(name, [], [_plain(value)]) for name, value in group.items()] for group in groups]
    return element("div", table(["", ""], rows), class_="facts")


def _row(name: str, cells: Sequence[Html], texts: Sequence[str] = ()) -> Html:
    head = element("th", name, scope="row")
    return element("tr", head, *cells, *[element("td", text) for text in texts])


def _title(name: str, cells: Sequence[Html], span: int) -> Html:
    return element("tr", element("th", name, scope="rowgroup"), *cells, element("td", colspan=span), class_="kind")


def _method(method: str) -> Html:
    return element("span", METHOD_NAMES[method], class_=KEYS[method])


def _scores(scores: Mapping[str, float]) -> list[Html]:
    others = [percent(scores["rougeL"]), number(scores["loss"], 3)]
    return [_bar(scores["exact_match"]), *[element("td", text) for text in others]]


def _both(scores: Mapping[str, Any]) -> list[Html]:
    return [_bar(scores[role]["exact_match"]) for role in ("held_in", "held_out")]


def _bar(value: float) -> Html:
    """Return a cell that is underlined as far as the share says."""
    return element("td", percent(value), class_="bar", style=f"--share: {100 * value:.1f}%")


def _trained(reading: Reading, kind: str) -> str:
    """Return how many numbers an expert trains."""
    return f"{round(reading.single(kind, 'parameters')):,}"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
