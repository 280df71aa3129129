"""Import: other people's fine-tuning as an expert of a library, checked against its base, with a record of its origin.

How each format is read is in `peft/`, `composable_sft.py`, `spiel.py` and `full_checkpoint.py`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from modular_experts.base import Base
from modular_experts.base.files import read_json, weight_files
from modular_experts.deltas import Delta
from modular_experts.interop.adapter import ForeignExpert
from modular_experts.interop.composable_sft import DIFF_FILE, read_composable_sft
from modular_experts.interop.compression import Form
from modular_experts.interop.full_checkpoint import CheckpointDeltas, Vocabulary, read_full_checkpoint
from modular_experts.interop.peft import read_peft
from modular_experts.interop.spiel import CONFIG_FILE, is_spiel, read_spiel
from modular_experts.library import StoredExpert, check_target, make_record, open_expert, write_expert
from modular_experts.progress import Progress

__all__ = ["Source", "find_source", "import_expert"]

log = logging.getLogger(__name__)


def import_expert(
    source: str | Path,
    out: str | Path,
    base: str | Path | None = None,
    revision: str | None = None,
    source_revision: str | None = None,
    form: Form | None = None,
    vocab: Vocabulary = "error",
    tasks: Sequence[str] = (),
    overwrite: bool = False,
    progress: Progress = iter,
) -> StoredExpert:
    """Write a fine-tuning from elsewhere as an expert; its record says where it came from, file by file.

    Args:
        source: Directory or hub id of a PEFT adapter, a composable-sft file or a full checkpoint.
        out: Directory of the expert; its last part is the name.
        base: Directory or hub id of the base; as an adapter's configuration says if not given.
        revision: Branch, tag or commit of the base on the hub.
        source_revision: The same of the source.
        form: How the differences of a full checkpoint are stored; exactly if not given.
        vocab: What becomes of a full checkpoint's resized vocabulary.
        tasks: Names of the tasks that it was trained on.
        overwrite: Whether an expert that is there may be replaced.
        progress: Wraps the names of a checkpoint's weights while they are gone through, for a progress bar.

    Raises:
        FileExistsError: `out` is there and may not be replaced; nothing has been read yet.
        FileNotFoundError: The source or the base was not found.
        ValueError: The format is not known, or a weight does not fit the base; nothing is written then.
    """
    check_target(out, overwrite)
    found = find_source(source, source_revision)
    place, revision = _base_of(found, base, revision)
    opened = Base.open(place, revision=revision)
    foreign = _read(found, opened, form, vocab, progress)
    record = make_record(
        foreign.kind,
        {"id": place, "revision": revision, "fingerprint": opened.fingerprint},
        hyperparameters=foreign.settings,
        tasks=tasks,
    )
    origin = {"id": found.place, "revision": found.revision, "format": found.format, "sha256": found.hashes()}
    write_expert(out, _checked(foreign, found, opened, origin), record | {"source": origin}, overwrite)
    return open_expert(out)


def _base_of(source: Source, base: str | Path | None, revision: str | None) -> tuple[str, str | None]:
    named, its_revision = source.base()
    if base is not None:
        if named is not None and Path(named).name != Path(base).name:
            log.warning("%s says that it was made from %s; it is taken as one of %s", source.place, named, base)
        return str(base), revision
    if named is None:
        raise ValueError(f"{source.place} does not name its base; give it with base, a directory or a hub id")
    return named, revision or its_revision


def _read(source: Source, base: Base, form: Form | None, vocab: Vocabulary, progress: Progress) -> ForeignExpert:
    if source.is_checkpoint:
        return read_full_checkpoint(source.directory, base, form, vocab, progress)
    if form is not None or vocab != "error":
        raise ValueError(
            f"{source.place} is no full checkpoint but a {source.format}, which is stored in the form that it has; "
            "leave out keep_ratio, rank and vocab"
        )
    if source.is_sparse_file:
        return read_composable_sft(source.directory, base)
    return read_spiel(source.directory, base) if is_spiel(source.directory) else read_peft(source.directory, base)


def _checked(foreign: ForeignExpert, source: Source, base: Base, origin: dict[str, Any]) -> Iterator[tuple[str, Delta]]:
    """Pass the deltas on, each once it is known to fit; at the end, note in the record what a checkpoint's import kept.

    The record is written after the last delta, so it holds that.
    """
    structure = base.structure
    for name, delta in foreign.deltas:
        structure.check(name, delta.shape, source.place)
        if source.is_adapter and len(twins := structure.twins(name)) > 1:
            raise ValueError(
                f"{source.place} moves {name} alone, and in {structure.place} {' and '.join(twins)} are one tensor "
                "(tied); import it against the base with untied embeddings (load it with tie_word_embeddings=False, "
                "and save it)"
            )
        yield name, delta
    if isinstance(foreign.deltas, CheckpointDeltas):
        origin |= foreign.deltas.origin()


_FETCHED = ["*.json", "*.safetensors", "adapter_model.bin", DIFF_FILE]
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Source:
    """A directory with a fine-tuning.

    Attributes:
        place: How it was named: a directory or a hub id.
        directory: Where its files are.
        revision: Branch, tag or commit of a hub id.
    """

    place: str
    directory: Path
    revision: str | None = None

    @property
    def is_adapter(self) -> bool:
        """Whether it has the configuration of a PEFT adapter."""
        return (self.directory / CONFIG_FILE).is_file()

    @property
    def is_sparse_file(self) -> bool:
        """Whether it has the one file of composable-sft."""
        return not self.is_adapter and (self.directory / DIFF_FILE).is_file()

    @property
    def is_checkpoint(self) -> bool:
        """Whether it is neither, and the directory of a model."""
        return not (self.is_adapter or self.is_sparse_file) and (self.directory / "config.json").is_file()

    @property
    def format(self) -> str:
        """What it is, in words."""
        if self.is_checkpoint:
            return "full checkpoint"
        return "composable-sft" if self.is_sparse_file else "PEFT adapter"

    def base(self) -> tuple[str | None, str | None]:
        """Return the base that an adapter's configuration names, and its revision."""
        config = read_json(self.directory / CONFIG_FILE, "so no base is named") if self.is_adapter else {}
        return config.get("base_model_name_or_path") or None, config.get("revision") or None

    def hashes(self) -> dict[str, str]:
        """Return the SHA-256 of each file that the numbers come from, and of the adapter's configuration."""
        files = [self.directory / name for name in (CONFIG_FILE, *_ADAPTER_FILES)] if self.is_adapter else []
        files += [self.directory / DIFF_FILE] if self.is_sparse_file else []
        files += weight_files(self.directory) if self.is_checkpoint else []
        return {file.name: _sha256(file) for file in files if file.is_file()}


def find_source(place: str | Path, revision: str | None = None) -> Source:
    """Return where a fine-tuning lies, after fetching it if it is a hub id that is not in the cache yet.

    Raises:
        FileNotFoundError: There is no such directory, and the hub does not give it.
        ValueError: Its files are of no known format; the sentence lists what was looked for.
    """
    directory = Path(place).expanduser()
    if directory.is_file():
        raise ValueError(f"{place} is a file; give the directory that it lies in, with the files beside it")
    source = Source(str(place), directory if directory.is_dir() else _from_hub(str(place), revision), revision)
    if not (source.is_adapter or source.is_sparse_file or source.is_checkpoint):
        raise ValueError(
            f"{place} holds no fine-tuning of a known format: looked for {CONFIG_FILE} (a PEFT adapter), {DIFF_FILE} "
            f"(composable-sft) and config.json with *.safetensors (a full checkpoint); it has "
            f"{_listing(source.directory)}"
        )
    return source


def _from_hub(place: str, revision: str | None) -> Path:
    try:
        return Path(snapshot_download(place, revision=revision, allow_patterns=_FETCHED))
    except HFValidationError:
        why = "and it is no hub id, which looks like 'owner/name'"
    except OSError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        offline = "HF_HUB_OFFLINE is set" if huggingface_hub.constants.HF_HUB_OFFLINE else "the hub was not reached"
        told = f"HTTP {status}; it may be private, gated or misspelt" if status else f"{offline}, no copy in the cache"
        why = f"and the hub does not give it under that id ({told})"
    raise FileNotFoundError(
        f"source {place!r} was not found: {Path(place).expanduser().absolute()} is no directory, {why}"
    )


def _listing(directory: Path) -> str:
    names = sorted(path.name for path in directory.iterdir())
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more if names else "no files"


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
