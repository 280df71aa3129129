"""Write the card of a hub repository of experts: what they are, where they come from, and how to use them.

A card states only what the records state. Fields of an earlier card's header that this one does not set, such as a
license, stay.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from modular_experts.library import StoredExpert
from modular_experts.library.record import DELTA_FILE, MERGE, files_of
from modular_experts.text import bytes_text

CARD_FILE = "README.md"
_LIBRARY = "modular-experts"
# Cards on the hub hold this line, so it must never change.
_MARK = "<!-- `modular-experts push` writes this page anew; take this line out to keep a text of your own -->"
_HEADER = re.compile(r"\A---\s*\n(.*?)^---\s*$\n?", re.DOTALL | re.MULTILINE)
_FEW = 8  # experts in the example of a merge, and tasks in a row of the table


@dataclass(frozen=True)
class CardEntry:
    """What a card shows of one expert.

    Attributes:
        name: Its name.
        record: The content of its `expert.json`.
        kept_share: Share of the entries of its weights that it keeps; None if unknown, or if it moves no weight.
        size: Bytes of its files.
        hub_base: Its base, if that is a model of the hub.
    """

    name: str
    record: Mapping[str, Any]
    kept_share: float | None
    size: int
    hub_base: str | None = None

    @classmethod
    def of(cls, expert: StoredExpert) -> CardEntry:
        """Return the entry of a stored expert."""
        return cls(expert.name, expert.record, expert.kept_share if len(expert) else None, expert.size_on_disk)

    @property
    def base(self) -> str:
        """Name of its base: the hub id, or the last part of a path, whose other parts stay private."""
        return self.hub_base or re.split(r"[/\\]", str(self.record["base"].get("id")).rstrip("/\\"))[-1]

    @property
    def fingerprint(self) -> str:
        """The fingerprint of its base."""
        return self.record["base"]["fingerprint"]


def is_ours(card: str) -> bool:
    """Return whether `push` may rewrite a card: `push` wrote it, or it has no text yet."""
    return _MARK in card or not _HEADER.sub("", card).strip()


def model_card(repo_id: str, entries: Sequence[CardEntry], earlier: str = "") -> str:
    """Return the card of a repository; header fields of the `earlier` card that it does not set are kept."""
    entries = sorted(entries, key=lambda entry: entry.name)
    header = yaml.safe_dump(_header(entries, earlier), sort_keys=False, allow_unicode=True)
    bases = dict.fromkeys(f"{_code(entry.base)} (fingerprint {_code(entry.fingerprint[:12])})" for entry in entries)
    what = "One expert" if len(entries) == 1 else f"{len(entries)} experts"
    top = [
        f"---\n{header}---\n{_MARK}\n",
        f"# {repo_id.partition('/')[2]}\n",
        f"{what} for {', '.join(bases)}, made with *modular-experts*.",
        "An expert moves some weights of a frozen base. Its folder holds the deltas (`delta.safetensors`: float32, to "
        "be added to the base) or, for types that are not deltas, the trained state (`state.safetensors`), and a "
        "record of its origin (`expert.json`). Experts of one base can be merged.\n",
    ]
    return "\n".join([*top, *_table(entries), *_use(repo_id, entries), *_provenance(entries)])


def _header(entries: Sequence[CardEntry], earlier: str) -> dict[str, Any]:
    found = _HEADER.match(earlier)
    kept = (yaml.safe_load(found[1]) if found else None) or {}
    bases = sorted({entry.hub_base for entry in entries if entry.hub_base})
    tags = [_LIBRARY, "parameter-efficient-fine-tuning"]
    tags += ["merge"] if any(entry.record["kind"] == MERGE for entry in entries) else []
    ours: dict[str, Any] = {"library_name": _LIBRARY}
    if bases:
        ours |= {"base_model": bases[0] if len(bases) == 1 else bases, "base_model_relation": "adapter"}
    old = kept.get("tags") if isinstance(kept.get("tags"), list) else []
    ours["tags"] = list(dict.fromkeys([*tags, *map(str, old or [])]))
    return ours | {name: value for name, value in kept.items() if name not in ours}


def _table(entries: Sequence[CardEntry]) -> Iterator[str]:
    yield "| expert | kind | tasks | kept | size | scores |"
    yield "|---|---|---|--:|--:|---|"
    for entry in entries:
        tasks = list(map(str, entry.record["tasks"]))
        shown = ", ".join(tasks) if len(tasks) <= _FEW else f"{len(tasks)} tasks"
        kept = "unknown" if entry.kept_share is None else f"{100 * entry.kept_share:.3g} %"
        scores = ", ".join(f"{name} {_number(score)}" for name, score in sorted(entry.record["scores"].items()))
        cells = [entry.name, entry.record["kind"], shown, kept, bytes_text(entry.size), scores or "none"]
        yield f"| {' | '.join(map(_plain, cells))} |"
    yield "\nKept is the share of the entries of its weights that an expert moves; scores come from its record.\n"


def _use(repo_id: str, entries: Sequence[CardEntry]) -> Iterator[str]:
    first = entries[0]
    base = first.hub_base or "BASE"
    applied = f"library/{first.name}"
    # The example of a merge takes the experts of the commonest base that can be merged and are not merges themselves.
    deltas = [entry for entry in entries if DELTA_FILE in files_of(entry.record)]
    trained = [e for e in deltas if not e.record.get("not_mergeable_because") and e.record["kind"] != MERGE]
    common = Counter(entry.fingerprint for entry in trained).most_common(1)
    alike = [entry for entry in trained if entry.fingerprint == common[0][0]] if common else []
    merged = next(name for name in ("merged", "all-merged", "newly-merged") if name not in {e.name for e in entries})
    yield "## Use\n\n```bash"
    yield "pip install .  # in a clone of modular-experts"
    yield f"modular-experts pull --repo {repo_id} --out library"
    yield f"modular-experts show library/{first.name}"
    yield f"modular-experts evaluate --base {base} --experts {applied} --tasks TASK.jsonl --out results"
    if len(alike) > 1:
        listed = " ".join(f"library/{entry.name}" for entry in alike[:_FEW])
        yield f"modular-experts merge {listed} --method SparseAverage --out library/{merged}"
        applied, first = f"library/{merged}", alike[0]
    yield f"modular-experts apply {applied} --base {first.hub_base or 'BASE'} --out checkpoint"
    yield "```\n"
    if any(entry.hub_base is None for entry in entries):
        yield "`BASE` is the directory of the base; another one is refused, by its fingerprint."
    yield '`TASK.jsonl` is a file of rows `{"input": ..., "target": ...}`; transformers loads `checkpoint`.\n'


def _provenance(entries: Sequence[CardEntry]) -> Iterator[str]:
    yield "## Provenance\n"
    for entry in entries:
        record, revision = entry.record, entry.record["base"].get("revision")
        at = f", revision {_code(revision)}" if revision else ""
        yield f"**{entry.name}**, content hash {_code(record['content_hash'])}\n"
        yield f"- base: {_code(entry.base)}{at}, fingerprint {_code(entry.fingerprint)}"
        made = {"": _call(record["kind"], record.get("hyperparameters") or {})}
        if record.get("method"):
            made = {"": _method(record["method"])}
            made |= {f"weights {_code(name)}: ": _method(m) for name, m in (record.get("per_weight") or {}).items()}
        yield f"- made as: {'; '.join(where + call for where, call in made.items())}"
        for parent in record["parents"]:
            yield f"- parent: {_plain(parent.get('name'))}, content hash {_code(parent.get('content_hash'))}"
        versions = ", ".join(f"{name} {version}" for name, version in (record.get("versions") or {}).items())
        seed = "" if record.get("seed") is None else f"; seed {_plain(record['seed'])}"
        yield f"- with: {_plain(versions) or 'versions not recorded'}{seed}\n"


def _method(method: Mapping[str, Any] | None) -> str:
    if not method:
        return "left at the base"
    return _call(str(method.get("class_path")).rpartition(".")[2], method.get("init_args") or {})


def _call(name: str, settings: Mapping[str, Any]) -> str:
    shown = ", ".join(f"{key}={value!r}" for key, value in settings.items() if value is not None)
    return _code(f"{name}({shown})" if shown else name)


def _number(score: Any) -> str:
    if isinstance(score, dict):
        return "(" + ", ".join(f"{name} {_number(value)}" for name, value in score.items()) + ")"
    return f"{score:.4g}" if isinstance(score, float) else str(score)


def _plain(text: Any) -> str:
    """Escape a text of a record, so that it stays in its cell and is not read as markup."""
    return re.sub(r"([\\`*_\[\]<>|#&])", r"\\\1", " ".join(str(text).split()))


def _code(text: Any) -> str:
    return "`" + " ".join(str(text).replace("`", "'").replace("|", "/").split()) + "`"
