"""`modular-experts show`: everything about one expert."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from modular_experts.cli.command import run_tool
from modular_experts.cli.format import bytes_text, call_text, share_text, statistics_text
from modular_experts.library import StoredExpert, open_expert, open_statistics
from modular_experts.library.statistics import kinds_of_statistics

EXAMPLES = """\
  modular-experts show library/ab
  modular-experts show library/ab --weights true"""


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


def run(argv: Sequence[str]) -> None:
    """Run the command."""
    run_tool(show, argv, EXAMPLES, positional=True)
