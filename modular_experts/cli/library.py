"""Run `modular-experts list`, `show` and `verify`, which read a library or an expert and print what they find."""

import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from modular_experts.base.base import Base, DType, find_base
from modular_experts.cli.format import call_text, counted, kind_text, share_text, statistics_text, table_of
from modular_experts.library import Library, StoredExpert, is_adapter, open_expert, open_statistics
from modular_experts.library.compatibility import open_parents
from modular_experts.library.record import DELTA_FILE, RECORD_FILE, STATE_FILE
from modular_experts.library.signing import verify_signature
from modular_experts.library.statistics import kinds_of_statistics
from modular_experts.study.options import UsageError
from modular_experts.text import bytes_text, depth_of, in_any_block, score_text


def list_library(library: str) -> None:
    """List the experts in a library, one a line, damaged and incomplete ones too.

    Args:
        library: Directory of the library.

    Examples:
        modular-experts list library
    """
    opened = Library(library)
    broken = ("damaged", "'verify' names the reason")
    rows: dict[str, tuple[str, ...]] = dict.fromkeys(opened.incomplete(), broken)
    for name in opened:
        try:
            # To open an adapter, its base is read.
            place = opened.directory / name
            rows[name] = ("PEFT adapter", "", "", "", "") if is_adapter(place) else _row(opened[name])
        except (ValueError, OSError):
            # One bad file must not hide the others.
            rows[name] = broken
    if not rows:
        print(f"{library} has no experts yet; `fit` and `merge` write into it: --out {library}/NAME")
        return
    table = table_of("expert", "kind", "tasks", "weights", "kept", "size", left=3)
    for name in sorted(rows):
        table.add_row(name, *rows[name])
    # Off a terminal the table is as wide as it needs to be, so that grep sees whole names.
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 1000
    Console(markup=False, emoji=False, width=width).print(table)


def _row(expert: StoredExpert) -> tuple[str, ...]:
    tasks = expert.record["tasks"]
    shown = ", ".join(tasks) if len(tasks) <= 4 else f"{len(tasks)} tasks"
    holds = (str(len(expert)), share_text(expert.kept_share)) if expert.forms() else ("", "")
    if expert.is_routed:
        holds = counted(len(expert.record["parents"]), "expert"), ""
    return kind_text(expert.record), shown, *holds, bytes_text(expert.size_on_disk)


def verify(
    expert: str,
    base: str | None = None,
    server: str | None = None,
    tasks: list[str] | None = None,
    dtype: DType = "float32",
    key: str | None = None,
) -> None:
    """Read an expert, or all experts of a library, and check every byte against its hash.

    Shapes, data types, bounds and order of the indices are checked too, and that all values are finite; of a routed
    expert, that the experts behind it are there and are those that it was made with. The base is
    compared by its fingerprint if it is given, or if the record leads to a directory that exists.

    With --server, a running server proves that it answers with each expert: the base, the expert and every other
    expert of the library compute its log-probabilities here for comparison. It may be this package's, vLLM or SGLang.

    Args:
        expert: Directory of an expert, or of a library.
        base: The base's directory or hub id.
        server: Address of a server of OpenAI's protocol, such as http://localhost:8000.
        tasks: Task files with prompts for the server; by default the inputs that the experts keep.
        dtype: Data type of the base that the server is compared with.
        key: Public key of the experts' owner, by whose signature, of `push --sign`, each expert must be signed.

    Examples:
        modular-experts verify library
        modular-experts verify library --server http://localhost:8000
    """
    place = Path(expert)
    alone = (
        not place.is_dir()
        or is_adapter(place)
        or any((place / file).exists() for file in (RECORD_FILE, DELTA_FILE, STATE_FILE))
    )
    if server:
        if key:
            raise UsageError("--key verifies signatures of files, and --server asks a server; give one of the two")
        return _verify_served(place, alone, server, base, tasks, dtype)
    if tasks or dtype != "float32":
        raise UsageError("--tasks and --dtype are for --server, which compares a server's answers; give its address")
    if alone:
        print(f"{expert}: {_verified(open_expert(expert, base), base, key)}")
        return
    library = Library(expert)
    failed = dict(library.incomplete())
    for name in library:
        try:
            print(f"{place / name}: {_verified(open_expert(place / name, base), base, key)}")
        except (ValueError, OSError) as error:
            failed[name] = str(error)
    for name, problem in failed.items():
        print(f"{place / name}: {problem}", file=sys.stderr)
    if failed:
        count = len({*library, *failed})
        raise ValueError(f"{len(failed)} of {count} experts in {expert} failed: {', '.join(sorted(failed))}")
    if not library:
        raise ValueError(f"{expert} holds no expert, so there is nothing to verify")
    print(f"{expert}: all {len(library)} experts are intact")


def _verify_served(
    place: Path, alone: bool, server: str, base: str | None, tasks: list[str] | None, dtype: DType
) -> None:
    from modular_experts.data import TaskMixture
    from modular_experts.interop.verify_server import verify_server
    from modular_experts.reports.progress import progress_bar

    known = [expert for expert in Library(place.parent if alone else place, base).readable() if not expert.is_routed]
    asked = [open_expert(place, base)] if alone else known
    others = [expert for expert in known if expert.name not in {expert.name for expert in asked}]
    data = TaskMixture(tasks) if tasks else None
    bar = progress_bar("comparing")
    verdicts = verify_server(server, asked, others, data, base, dtype=dtype, progress=bar)
    for verdict in verdicts:
        print(verdict)
    # A server may have a part of the library; an expert that the user names must be there.
    required = [verdict for verdict in verdicts if alone or verdict.finding != "absent"]
    if not required:
        raise ValueError(f"{server} serves no expert of {place}; start it with them")
    if failed := [verdict.expert for verdict in required if verdict.finding != "acts"]:
        raise ValueError(f"of {counted(len(required), 'expert')} these do not act: {', '.join(failed)}")
    print(f"{server}: {counted(len(required), 'expert')} asked for, and each acts")


def _verified(expert: StoredExpert, base: str | None, key: str | None) -> str:
    expert.verify()
    signed = ""
    if key is not None:
        for member in [expert, *(open_parents(expert) if expert.is_routed else ())]:
            member.verify()
            verify_signature(member, key)
        signed = f"signed by the owner of {key}, "
    holds = f"{len(expert)} weights"
    if expert.is_routed:
        count = len(open_parents(expert))
        router = kind_text(expert.record).removeprefix("routed: ")
        holds = f"the router {router} and {counted(count, 'expert')} behind it"
    intact = f"intact, {signed}{holds}, content hash {expert.content_hash[:12]}"
    place = base or find_base([expert])
    if base is None and not Path(place).is_dir():
        return f"{intact}; base not checked ({place} is not a directory here; give --base)"
    Base.open(place, [expert])
    return f"{intact}; base {place} is the one it was trained on"


class Measure(NamedTuple):
    """What a set of weights adds up to; `squares` is the sum of the squares of their deltas' entries."""

    weights: int
    entries: int
    kept: int
    squares: float

    @classmethod
    def total(cls, measures: "Iterable[Measure]") -> "Measure":
        return cls(*map(sum, zip(cls(0, 0, 0, 0.0), *measures, strict=True)))

    def cells(self) -> tuple[str, ...]:
        share = share_text(self.kept / max(self.entries, 1))
        return str(self.weights), f"{self.kept:,}", share, f"{math.sqrt(self.squares):.4g}"


def show(expert: str, weights: bool = False) -> None:
    """Show one expert: what kind, from where, how much of each layer it keeps, how far it moves.

    Args:
        expert: Directory of the expert.
        weights: List every weight instead of every layer.

    Examples:
        modular-experts show library/ab
        modular-experts show library/ab --weights
    """
    stored = open_expert(expert)
    console = Console(markup=False, emoji=False)
    kept = stored.kept_entries()
    measures = {name: Measure(1, delta.shape.numel(), kept[name], delta.norm() ** 2) for name, delta in stored.items()}
    facts = Table.grid(padding=(0, 2))
    facts.add_row("expert", expert)
    for name, text in _facts(stored, Measure.total(measures.values())):
        facts.add_row(name, text)
    console.print(facts)
    groups: list[tuple[str, Callable[[str], Any]]] = [("weight", str)]
    if not weights:
        groups = [("layer", depth_of), ("weights named", _own_name)]
    for heading, group in groups if measures else ():
        table = table_of(heading, "weights", "kept", "share", "norm")
        parts: dict[Any, list[Measure]] = {}
        for name, measure in measures.items():
            parts.setdefault(group(name), []).append(measure)
        for part in sorted(parts, key=lambda part: (part is None, part)):
            table.add_row("none" if part is None else str(part), *Measure.total(parts[part]).cells())
        console.print(table)


def _own_name(weight: str) -> str:
    return in_any_block(weight).removesuffix(".weight").rpartition(".")[2]


def _facts(expert: StoredExpert, total: Measure) -> Iterable[tuple[str, str]]:
    record = expert.record
    base = expert.record["base"]
    forms = Counter(expert.stored_as().values())
    settings = dict(record.get("hyperparameters") or {})
    shares = [settings.pop(name, None) for name in ("kept", "ever_trained")]
    held = ", ".join(f"{count} {form}" for form, count in sorted(forms.items())) or "no deltas"
    yield "holds", f"{held}; {bytes_text(expert.size_on_disk)}"
    yield "kind", call_text(record["kind"], settings)
    if method := record.get("method"):
        yield "method", call_text(method["class_path"].rpartition(".")[2], method["init_args"])
    for pattern, chosen in (record.get("per_weight") or {}).items():
        yield "method", f"{pattern}: {chosen['class_path'].rpartition('.')[2] if chosen else 'stays at the base'}"
    yield "tasks", ", ".join(map(str, record["tasks"])) or "not recorded"
    yield from _training(record.get("training") or {})
    yield "base", f"{base.get('id')} (fingerprint {base['fingerprint'][:12]})"
    if source := record.get("source"):
        yield "source", f"{source.get('id')} ({source.get('format')})"
    for parent in record["parents"]:
        yield "parent", f"{parent.get('name')} (content {str(parent.get('content_hash'))[:12]})"
    # `ExpertModule` logs losses per target token under these names.
    words = {"val_loss": "validation loss", "loss": "training loss of the last batch"}
    for name, score in sorted(record["scores"].items()):
        metric, _, task = name.partition("/")
        yield "score", f"{words.get(metric, metric)}{f' of {task}' if task else ''}: {score_text(score)}"
    if expert.acts_on_answers:
        yield "acts on", "answers alone; the base reads prompts"
        yield "merging", "with experts that act on answers alone, and not into the base's weights"
    elif not expert.mergeable:
        yield "merging", f"not possible, because {expert.not_mergeable_because}"
    if state := expert.state():
        numbers = sum(tensor.numel() for tensor in state.values())
        yield "state", f"{len(state)} tensors with {numbers:,} numbers, of {record.get('class_path')}"
    if forms:
        yield "kept", f"{total.kept:,} of {total.entries:,} entries ({total.cells()[2]})"
    if shares[1] is not None:
        yield "trained", f"{share_text(shares[0])} of the units at the end, {share_text(shares[1])} at any time"
    if expert.keeps_inputs:
        yield "inputs", f"{record['inputs']['rows']:,} kept, as token ids"
    if costs := record.get("costs"):
        shown = {name: bytes_text(value) if name.endswith("bytes") else f"{value:.3g}" for name, value in costs.items()}
        yield "costs", ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shown.items())
    if forms:
        yield "norm", total.cells()[3]
    for kind in kinds_of_statistics(expert):
        yield "statistics", f"{kind}: {statistics_text(open_statistics(expert, kind))}"
    yield "content", expert.content_hash
    seed = "" if record.get("seed") is None else f", seed {record['seed']}"
    yield "created", f"{record.get('created')}{seed}"
    yield "versions", ", ".join(f"{name} {version}" for name, version in (record.get("versions") or {}).items())


def _training(facts: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    plain = {name: value for name, value in facts.items() if name not in ("data", "config") and value is not None}
    if plain:
        yield "training", ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in plain.items())
    for task, data in (facts.get("data") or {}).items():
        rows = ", ".join(f"{count} {split}" for split, count in data["rows"].items())
        yield "rows", f"{task}: {rows} (content {data['hash'][:12]})"
    if facts.get("config"):
        yield "configuration", facts["config"]
