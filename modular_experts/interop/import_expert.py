"""Import: other people's fine-tuning as an expert of a library, checked against its base, with a record of its origin.

How each format is read is in `peft/`, `composable_sft.py`, `spiel.py` and `full_checkpoint.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from modular_experts.deltas import Delta
from modular_experts.interop.checkpoint import fingerprint, resolve_base
from modular_experts.interop.composable_sft import read_composable_sft
from modular_experts.interop.foreign import ForeignExpert
from modular_experts.interop.forms import Form
from modular_experts.interop.full_checkpoint import CheckpointDeltas, Vocabulary, read_full_checkpoint
from modular_experts.interop.peft import read_peft
from modular_experts.interop.skeleton import read_skeleton
from modular_experts.interop.sources import Source, find_source
from modular_experts.interop.spiel import is_spiel, read_spiel
from modular_experts.library import StoredExpert, check_target, make_record, open_expert, write_expert

__all__ = ["import_expert"]

log = logging.getLogger(__name__)

Progress = Callable[[Sequence[str]], Iterable[str]]


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
    directory = resolve_base(place, revision)
    foreign = _read(found, directory, form, vocab, progress)
    record = make_record(
        foreign.kind,
        {"id": place, "revision": revision, "fingerprint": fingerprint(directory)},
        hyperparameters=foreign.settings,
        tasks=tasks,
    )
    origin = {"id": found.place, "revision": found.revision, "format": found.format, "sha256": found.hashes()}
    write_expert(out, _checked(foreign, found, directory, origin), record | {"source": origin}, overwrite)
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


def _read(source: Source, base: Path, form: Form | None, vocab: Vocabulary, progress: Progress) -> ForeignExpert:
    if source.is_checkpoint:
        resolve_base(source.directory)
        return read_full_checkpoint(source.directory, base, form, vocab, progress)
    if form is not None or vocab != "error":
        raise ValueError(
            f"{source.place} is no full checkpoint but a {source.format}, which is stored in the form that it has; "
            "leave out keep_ratio, rank and vocab"
        )
    if source.is_sparse_file:
        return read_composable_sft(source.directory, base)
    return read_spiel(source.directory, base) if is_spiel(source.directory) else read_peft(source.directory, base)


def _checked(foreign: ForeignExpert, source: Source, base: Path, origin: dict[str, Any]) -> Iterator[tuple[str, Delta]]:
    """Pass the deltas on, each once it is known to fit; at the end, note in the record what a checkpoint's import kept.

    The record is written after the last delta, so it holds that.
    """
    skeleton = read_skeleton(base)
    for name, delta in foreign.deltas:
        skeleton.check(name, delta.shape, source.place)
        if source.is_adapter and len(twins := skeleton.twins(name)) > 1:
            raise ValueError(
                f"{source.place} moves {name} alone, and in {skeleton.place} {' and '.join(twins)} are one tensor "
                "(tied); import it against the base with untied embeddings (load it with tie_word_embeddings=False, "
                "and save it)"
            )
        yield name, delta
    if isinstance(foreign.deltas, CheckpointDeltas):
        origin |= foreign.deltas.origin()
