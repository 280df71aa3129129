"""`modular-experts list`, `show` and `verify`: what a library and an expert hold, and whether the files are intact."""

from __future__ import annotations

import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from modular_experts.base.base import Base, find_base
from modular_experts.cli.format import call_text, kind_text, share_text, statistics_text
from modular_experts.library import Library, StoredExpert, open_expert, open_statistics
from modular_experts.library.record import DELTA_FILE, RECORD_FILE, STATE_FILE
from modular_experts.library.statistics import kinds_of_statistics
from modular_experts.text import bytes_text

__all__ = ["list_library", "show", "verify"]

_BROKEN = ("", "damaged", "", "'verify' says why")
# Width when stdout is not a terminal, so that grep sees whole names.
_UNFOLDED = 1000
_MOST_TASKS = 4


def list_library(directory: str) -> None:
    """List the experts in a library, one a line, damaged and incomplete ones too.

    The base is shown if the experts have different ones.

    Args:
        directory: Directory of the library.

    Examples:
        modular-experts list library
    """
    library = Library(directory)
    rows = {name: _row(library, name) for name in library} | dict.fromkeys(library.incomplete(), _BROKEN)
    if not rows:
        if (Path(directory).expanduser() / RECORD_FILE).is_file():
            raise ValueError(f"{directory} is an expert, not a library; `modular-experts show {directory}` shows it")
        print(f"{directory} has no experts yet; 'fit' with ExportExpert and 'merge' write into a library")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    several = len({row[0] for row in rows.values() if row[0]}) > 1
    for name in ("expert", "kind", "base", "tasks") if several else ("expert", "kind", "tasks"):
        table.add_column(name, overflow="fold")
    for name in ("weights", "kept", "size"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in sorted(rows):
        fingerprint, kind, base, *others = rows[name]
        table.add_row(name, kind, *[f"{base} {fingerprint[:7]}".strip()] * several, *others)
    watched = sys.stdout.isatty() or "COLUMNS" in os.environ
    Console(markup=False, emoji=False, width=None if watched else _UNFOLDED).print(table)


def _row(library: Library, name: str) -> tuple[str, ...]:
    """Return the fingerprint of an expert's base, and the cells of the expert."""
    try:
        expert = library[name]
    except (ValueError, OSError):
        # One bad file must not hide the others.
        return _BROKEN
    tasks, base = expert.record["tasks"], expert.record["base"]
    shown = ", ".join(tasks) if len(tasks) <= _MOST_TASKS else f"{len(tasks)} tasks"
    place = (base.get("id") or "").rstrip("/").rpartition("/")[2]
    numbers = str(len(expert)), share_text(expert.kept_share), bytes_text(expert.size_on_disk)
    return base["fingerprint"], kind_text(expert.record), place, shown, *numbers


def verify(directory: str, base: str | None = None, revision: str | None = None) -> None:
    """Read an expert, or all experts of a library, and check every byte against its hash.

    Shapes, data types, bounds and order of the indices are checked too, and that all values are finite. The base is
    compared by its fingerprint if it is given, or if the record leads to a directory that exists.

    Args:
        directory: Directory of an expert, or of a library.
        base: The base's directory or hub id.
        revision: Branch, tag or commit of a hub id.

    Examples:
        modular-experts verify library/ab
        modular-experts verify library
        modular-experts verify library/ab --base runs/base
    """
    place = Path(directory)
    if not place.is_dir() or any((place / file).exists() for file in (RECORD_FILE, DELTA_FILE, STATE_FILE)):
        print(f"{directory}: {_verified(open_expert(directory), base, revision)}")
        return
    library = Library(directory)
    failed = dict(library.incomplete())
    if not library and not failed:
        raise ValueError(f"{directory} holds no expert, so there is nothing to verify")
    for name, problem in failed.items():
        print(f"{place / name}: {problem}", file=sys.stderr)
    for name in library:
        try:
            print(f"{place / name}: {_verified(open_expert(place / name), base, revision)}")
        except (ValueError, OSError) as error:
            failed[name] = str(error)
            print(f"{place / name}: {error}", file=sys.stderr)
    if failed:
        count = len({*library, *failed})
        raise ValueError(f"{len(failed)} of {count} experts in {directory} failed: {', '.join(sorted(failed))}")
    print(f"{directory}: all {len(library)} experts are intact")


def _verified(expert: StoredExpert, base: str | None, revision: str | None) -> str:
    """Check one expert, and return the sentence about it."""
    expert.verify()
    intact = f"intact, {len(expert)} weights, content hash {expert.content_hash[:12]}"
    place = base or find_base([expert])
    if base is None and not Path(place).is_dir():
        return f"{intact}; base not checked ({place} is not a directory here; give --base)"
    Base.open(place, [expert], revision)
    return f"{intact}; base {place} is the one it was trained on"


@dataclass(frozen=True)
class Measure:
    """What a set of weights adds up to: entries, kept entries, and the Frobenius norm of their deltas."""

    weights: int
    entries: int
    kept: int
    norm: float

    @classmethod
    def total(cls, parts: Iterable[Measure]) -> Measure:
        """Return the measure of several disjoint sets together."""
        parts = list(parts)
        norm = math.sqrt(sum(part.norm**2 for part in parts))
        return cls(sum(p.weights for p in parts), sum(p.entries for p in parts), sum(p.kept for p in parts), norm)

    def cells(self) -> tuple[str, ...]:
        """Return the cells of a table row."""
        return str(self.weights), f"{self.kept:,}", share_text(self.kept / max(self.entries, 1)), f"{self.norm:.4g}"


def show(directory: str, weights: bool = False) -> None:
    """Show one expert: what kind, from where, how much of each layer it keeps, how far it moves.

    Args:
        directory: Directory of the expert.
        weights: List every weight instead of every layer.

    Examples:
        modular-experts show library/ab
        modular-experts show library/ab --weights
    """
    expert, console = open_expert(directory), Console(markup=False, emoji=False)
    measures = {}
    kept = expert.kept_entries()
    for name, delta in expert.items():
        measures[name] = Measure(1, delta.shape.numel(), kept[name], delta.norm())
    facts = Table.grid(padding=(0, 2))
    for name, text in _facts(expert, Measure.total(measures.values())):
        facts.add_row(name, text)
    console.print(facts)
    if weights:
        console.print(_table("weight", measures))
        return
    console.print(_table("layer", _grouped(measures, _layer)))
    console.print(_table("weights named", _grouped(measures, _role)))


def _facts(expert: StoredExpert, total: Measure) -> Iterable[tuple[str, str]]:
    record, base = expert.record, expert.record["base"]
    forms = Counter(expert.forms().values())
    yield "expert", str(expert.path)
    settings = dict(record.get("hyperparameters") or {})
    shares = [settings.pop(name, None) for name in ("kept", "ever_trained")]
    yield "kind", call_text(record["kind"], settings)
    if record.get("method"):
        yield "method", call_text(record["method"]["class_path"].rpartition(".")[2], record["method"]["init_args"])
    yield "tasks", ", ".join(map(str, record["tasks"])) or "none recorded"
    yield "base", f"{base.get('id')} (fingerprint {base['fingerprint'][:12]})"
    if source := record.get("source"):
        yield "source", f"{source.get('id')} ({source.get('format')})"
    for pattern, chosen in (record.get("per_weight") or {}).items():
        yield "method", f"{pattern}: {chosen['class_path'].rpartition('.')[2] if chosen else 'stays at the base'}"
    for parent in record["parents"]:
        yield "parent", f"{parent.get('name')} (content {str(parent.get('content_hash'))[:12]})"
    for name, score in sorted(record["scores"].items()):
        yield "score", f"{_score_name(name)}: {_score(score)}"
    if not expert.mergeable:
        yield "merging", f"not possible, because {expert.not_mergeable_because}"
    if state := expert.state():
        numbers = sum(tensor.numel() for tensor in state.values())
        yield "state", f"{len(state)} tensors with {numbers:,} numbers, of {record.get('class_path')}"
    yield "forms", ", ".join(f"{count} {form}" for form, count in sorted(forms.items())) or "no deltas"
    yield "kept", f"{total.kept:,} of {total.entries:,} entries ({share_text(total.kept / max(total.entries, 1))})"
    if shares[1] is not None:
        yield "trained", f"{share_text(shares[0])} of the units at the end, {share_text(shares[1])} at any time"
    yield from _costs(record.get("costs") or {})
    yield "norm", f"{total.norm:.4g}"
    for kind in kinds_of_statistics(expert):
        yield "statistics", f"{kind}: {statistics_text(open_statistics(expert, kind))}"
    yield "size", bytes_text(expert.size_on_disk)
    yield "content", expert.content_hash
    yield "created", f"{record.get('created')}, seed {record.get('seed')}"
    yield "versions", ", ".join(f"{name} {version}" for name, version in (record.get("versions") or {}).items())


def _costs(costs: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    if "optimizer_bytes" in costs:
        yield "optimizer", f"{bytes_text(costs['optimizer_bytes'])} of state"
    if costs.get("selections"):
        passes, seconds = costs["selection_passes"], costs["selection_seconds"]
        held = f"at most {bytes_text(costs['selection_bytes'])} more memory in use than before"
        times = "once" if costs["selections"] == 1 else f"{costs['selections']} times"
        yield "selection", f"{times}, {passes} passes, {seconds:.3g} s, {held}"
    if "overlap" in costs:
        yield "overlap", f"of the experts to avoid, {costs['overlap']:.3g} keep an entry that is kept here, on average"


def _score_name(name: str) -> str:
    """Return what a logged metric means: `ExpertModule` logs losses per target token."""
    metric, _, task = name.partition("/")
    word = {"val_loss": "validation loss", "loss": "training loss of the last batch"}.get(metric, metric)
    return f"{word} of {task}" if task else word


def _score(score: Any) -> str:
    if isinstance(score, dict):
        return ", ".join(f"{name} {_score(value)}" for name, value in score.items())
    return f"{score:.4g}" if isinstance(score, float) else str(score)


def _grouped(measures: dict[str, Measure], group: Any) -> dict[str, Measure]:
    groups: dict[str, list[Measure]] = {}
    for name, measure in measures.items():
        groups.setdefault(group(name), []).append(measure)
    ordered = sorted(groups, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))
    return {name: Measure.total(groups[name]) for name in ordered}


def _layer(name: str) -> str:
    found = re.search(r"\.(\d+)\.", name)
    return found[1] if found else "none"


def _role(name: str) -> str:
    return ".".join(name.removesuffix(".weight").split(".")[-1:])


def _table(heading: str, measures: dict[str, Measure]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(heading, overflow="fold")
    for name in ("weights", "kept", "share", "norm"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, measure in measures.items():
        table.add_row(name, *measure.cells())
    return table
