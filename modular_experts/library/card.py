"""Write the card of a hub repository of experts, which states only what their records state."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import yaml

from modular_experts.library.record import MERGE, Facts, Record
from modular_experts.text import bytes_text, score_text

CARD_FILE = "README.md"
_LIBRARY = "modular-experts"
# Cards on the hub hold this line, so it must never change.
_MARK = "<!-- `modular-experts push` writes this page anew; take this line out to keep a text of your own -->"
_HEADER = re.compile(r"\A---\s*\n(.*?)^---\s*$\n?", re.DOTALL | re.MULTILINE)
_FEW = 8  # experts in the example of a merge, and tasks in a row of the table


@dataclass(frozen=True)
class CardEntry:
    """What a card shows of one expert: `size` is the bytes of its files, `hub_base` its base if the hub has it, and
    `inputs` whether inputs of its tasks come with it.
    """

    name: str
    record: Facts
    size: int
    hub_base: str | None = None
    inputs: bool = False

    @property
    def base(self) -> str:
        """Name of its base: the hub id, or the last part of a path, whose other parts stay private."""
        return self.hub_base or re.split(r"[/\\]", str(self.record["base"].get("id")).rstrip("/\\"))[-1]

    @property
    def fingerprint(self) -> str:
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
    if kept := [_code(entry.name) for entry in entries if entry.inputs]:
        top.append(
            f"**Privacy**: inputs of their training rows come with {', '.join(kept)}, as token ids without targets "
            "(`inputs.safetensors`), so that merges and routers learn from them. The base's tokenizer turns them back "
            "into text.\n"
        )
    return "\n".join([*top, *_table(entries), *_use(repo_id, entries)])


def _header(entries: Sequence[CardEntry], earlier: str) -> Record:
    match = _HEADER.match(earlier)
    kept = (yaml.safe_load(match[1]) if match else None) or {}
    bases = sorted({entry.hub_base for entry in entries if entry.hub_base})
    tags = [_LIBRARY, "parameter-efficient-fine-tuning"]
    tags += ["merge"] if any(entry.record["kind"] == MERGE for entry in entries) else []
    licenses = sorted({entry.record["license"] for entry in entries if "license" in entry.record})
    ours: Record = {"library_name": _LIBRARY}
    if licenses:
        ours["license"] = licenses[0] if len(licenses) == 1 else licenses
    if bases:
        ours |= {"base_model": bases[0] if len(bases) == 1 else bases, "base_model_relation": "adapter"}
    old = kept.get("tags") if isinstance(kept.get("tags"), list) else []
    ours["tags"] = list(dict.fromkeys([*tags, *map(str, old or [])]))
    return ours | {name: value for name, value in kept.items() if name not in ours}


def _table(entries: Sequence[CardEntry]) -> Iterator[str]:
    yield "| expert | kind | tasks | size | scores | content hash |"
    yield "|---|---|---|--:|---|---|"
    for entry in entries:
        tasks = list(map(str, entry.record["tasks"]))
        shown = ", ".join(tasks) if len(tasks) <= _FEW else f"{len(tasks)} tasks"
        texts = {name: score_text(score) for name, score in sorted(entry.record["scores"].items())}
        several = {name for name, score in entry.record["scores"].items() if isinstance(score, dict)}
        scores = ", ".join(f"{name} ({text})" if name in several else f"{name} {text}" for name, text in texts.items())
        cells = [entry.name, entry.record["kind"], shown, bytes_text(entry.size)]
        cells += [scores or "none", entry.record["content_hash"][:12]]
        yield f"| {' | '.join(map(_plain, cells))} |"
    yield "\n`modular-experts show` prints the record of an expert: its method, parents, settings and versions.\n"


def _use(repo_id: str, entries: Sequence[CardEntry]) -> Iterator[str]:
    expert = f"library/{entries[0].name}"
    base = entries[0].hub_base or "BASE"
    yield "## Use\n\n```bash"
    yield "pip install .  # in a clone of modular-experts"
    yield f"modular-experts pull --repo {repo_id} --out library"
    yield f"modular-experts show {expert}"
    yield f"modular-experts evaluate --base {base} --experts {expert} --tasks TASK.jsonl --out results"
    yield f"modular-experts apply {expert} --base {base} --out checkpoint"
    yield "```\n"
    if any(entry.hub_base is None for entry in entries):
        yield "`BASE` is the directory of the base; another one is refused, by its fingerprint."
    yield '`TASK.jsonl` is a file of rows `{"input": ..., "target": ...}`; transformers loads `checkpoint`.\n'


def _plain(text: object) -> str:
    """Escape a text of a record, so that it stays in its cell and is not read as markup."""
    return re.sub(r"([\\`*_\[\]<>|#&])", r"\\\1", " ".join(str(text).split()))


def _code(text: object) -> str:
    return "`" + " ".join(str(text).replace("`", "'").replace("|", "/").split()) + "`"
