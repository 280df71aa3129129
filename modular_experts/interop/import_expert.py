"""Import another tool's fine-tuning as an expert: find its format, read it, check it against its base, and write it.

`peft/`, `composable_sft.py`, `spiel.py` and `full_checkpoint.py` read one format each.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modular_experts.base import Base
from modular_experts.base.files import weight_files
from modular_experts.base.loading import fetch_from_hub
from modular_experts.deltas import Delta
from modular_experts.interop.adapter import ImportedAdapter
from modular_experts.interop.composable_sft import DIFF_FILE, read_composable_sft
from modular_experts.interop.compression import Compression
from modular_experts.interop.full_checkpoint import CheckpointDeltas, Vocabulary, read_full_checkpoint
from modular_experts.interop.peft import read_peft
from modular_experts.interop.peft.files import CONFIG_FILE, AdapterFiles
from modular_experts.interop.spiel import PEFT_TYPE, read_spiel
from modular_experts.library import StoredExpert, check_target, make_record, open_expert, write_expert
from modular_experts.progress import Progress

log = logging.getLogger(__name__)

_FETCHED = ["*.json", "*.safetensors", "adapter_model.bin", DIFF_FILE]


def import_expert(
    source: str | Path,
    out: str | Path,
    base: str | Path | Base | None = None,
    revision: str | None = None,
    source_revision: str | None = None,
    compression: Compression | None = None,
    vocab: Vocabulary = "error",
    tasks: Sequence[str] = (),
    overwrite: bool = False,
    progress: Progress = iter,
) -> StoredExpert:
    """Write another tool's fine-tuning as an expert; its record lists the source, file by file.

    Args:
        source: Directory or hub id of a PEFT adapter, a composable-sft file or a full checkpoint.
        out: Directory of the expert; its last part is the name.
        base: Directory or hub id of the base; the one that an adapter's configuration names if not given.
        revision: Branch, tag or commit of the base on the hub.
        source_revision: Branch, tag or commit of the source on the hub.
        compression: How to store the differences of a full checkpoint; `Lossless` if not given.
        vocab: What to do with a full checkpoint's resized vocabulary.
        tasks: Names of the tasks that it was trained on.
        overwrite: Replace an expert that is there.
        progress: Iterator wrapper for a full checkpoint's weights, e.g. `tqdm`.

    Raises:
        FileExistsError: `out` is there and may not be replaced; nothing has been read yet.
        FileNotFoundError: The source or the base was not found.
        ValueError: The format is not known, or a weight does not fit the base; nothing is written then.
    """
    check_target(out, overwrite)
    found = find_source(source, source_revision)
    named = found.adapter.base if found.adapter else None
    if base is None:
        if named is None:
            raise ValueError(f"{found.place} does not name its base; give it with base, a directory or a hub id")
        assert found.adapter is not None
        base, revision = named, revision or found.adapter.revision
    elif named is not None and not isinstance(base, Base) and Path(named).name != Path(base).name:
        log.warning("%s names %s as its base; it is imported as an expert of %s instead", found.place, named, base)
    opened = Base.open(base, revision=revision)
    imported = found.read(opened, compression, vocab, progress)
    record = make_record(
        imported.kind,
        {"id": opened.place, "revision": opened.revision, "fingerprint": opened.fingerprint},
        hyperparameters=imported.settings,
        tasks=tasks,
    )
    origin = {"id": found.place, "revision": found.revision, "format": found.format, "sha256": found.hashes()}
    deltas = _checked_deltas(imported, found, opened, origin)
    write_expert(out, deltas, record | {"source": origin}, overwrite)
    return open_expert(out)


def _checked_deltas(
    imported: ImportedAdapter, source: Source, base: Base, origin: dict[str, Any]
) -> Iterator[tuple[str, Delta]]:
    """Yield each delta once it is known to fit; after the last one, add a full checkpoint's report to `origin`.

    `write_expert` writes the record, which holds `origin`, after the last delta.
    """
    structure = base.structure
    for name, delta in imported.deltas:
        structure.check(name, delta.shape, source.place)
        if source.adapter and len(twins := structure.twins(name)) > 1:
            raise ValueError(
                f"{source.place} moves {name} alone, and in {structure.place} {' and '.join(twins)} are one tensor "
                "(tied); import it against the base with untied embeddings (load it with tie_word_embeddings=False, "
                "and save it)"
            )
        yield name, delta
    if isinstance(imported.deltas, CheckpointDeltas):
        origin |= imported.deltas.record()


@dataclass(frozen=True)
class Source:
    """A directory with a fine-tuning of a known format.

    Attributes:
        place: Its directory or hub id, as the user gave it.
        directory: Where its files are.
        revision: Branch, tag or commit of a hub id.
        adapter: The files of a PEFT adapter; None for the other formats.
        format: `PEFT adapter`, `composable-sft` or `full checkpoint`.
    """

    place: str
    directory: Path
    revision: str | None
    adapter: AdapterFiles | None
    format: str

    def read(
        self, base: Base, compression: Compression | None, vocab: Vocabulary, progress: Progress
    ) -> ImportedAdapter:
        """Read the fine-tuning as deltas of its base.

        Raises:
            ValueError: It does not fit the base, or settings of a full checkpoint are given for something else.
        """
        if self.format == "full checkpoint":
            return read_full_checkpoint(self.directory, base, compression, vocab, progress)
        if compression is not None or vocab != "error":
            raise ValueError(
                f"{self.place} ({self.format}) is not a full checkpoint, so it is stored in the form that it has; "
                "leave out keep_ratio, rank and vocab"
            )
        if self.adapter is None:
            return read_composable_sft(self.directory, base)
        reader = read_spiel if self.adapter.config.get("peft_type") == PEFT_TYPE else read_peft
        return reader(self.adapter, base)

    def hashes(self) -> dict[str, str]:
        """Return the SHA-256 of each file that the numbers come from, and of an adapter's configuration."""
        if self.format == "full checkpoint":
            files = weight_files(self.directory)
        elif self.adapter is None:
            files = [self.directory / DIFF_FILE]
        else:
            files = [self.directory / CONFIG_FILE, self.adapter.file]
        found = {}
        for file in files:
            with file.open("rb") as content:
                found[file.name] = hashlib.file_digest(content, "sha256").hexdigest()
        return found


def find_source(place: str | Path, revision: str | None = None) -> Source:
    """Find a fine-tuning and its format, after fetching it if it is a hub id that is not in the cache yet.

    Raises:
        FileNotFoundError: There is no such directory, and the hub does not give it.
        ValueError: Its files are of no known format; the sentence lists what was looked for.
    """
    directory = Path(place).expanduser()
    if directory.is_file():
        raise ValueError(f"{place} is a file; give the directory that holds it and the files beside it")
    if not directory.is_dir():
        advice = "give the directory of a fine-tuning, or a hub id while the hub is reachable"
        directory = fetch_from_hub("source", str(place), revision, _FETCHED, advice)
    if (directory / CONFIG_FILE).is_file():
        return Source(str(place), directory, revision, AdapterFiles(directory), "PEFT adapter")
    if (directory / DIFF_FILE).is_file():
        return Source(str(place), directory, revision, None, "composable-sft")
    if (directory / "config.json").is_file():
        return Source(str(place), directory, revision, None, "full checkpoint")
    names = sorted(path.name for path in directory.iterdir())
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    raise ValueError(
        f"{place} holds no fine-tuning of a known format: looked for {CONFIG_FILE} (a PEFT adapter), {DIFF_FILE} "
        f"(composable-sft) and config.json with *.safetensors (a full checkpoint); it has "
        f"{', '.join(names[:6]) + more if names else 'no files'}"
    )
