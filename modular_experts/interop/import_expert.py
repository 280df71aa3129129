"""Import another tool's fine-tuning as an expert: find its format, read it, check it against its base, and write it."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from modular_experts.base import Base
from modular_experts.base.files import fetch_from_hub, weight_files
from modular_experts.deltas import Delta
from modular_experts.interop.full_checkpoint import CheckpointDeltas, read_full_checkpoint
from modular_experts.interop.peft import read_peft
from modular_experts.interop.peft.asked import AskedDeltas
from modular_experts.interop.peft.files import CONFIG_FILE, AdapterFiles
from modular_experts.library import StoredExpert, check_target, make_record, open_expert, write_expert
from modular_experts.library.tensorfile import file_hash
from modular_experts.progress import Progress

log = logging.getLogger(__name__)

_FETCHED = ["*.json", "*.safetensors", "adapter_model.bin"]


def import_expert(
    source: str | Path,
    out: str | Path,
    base: str | Path | Base | None = None,
    revision: str | None = None,
    tasks: Sequence[str] = (),
    overwrite: bool = False,
    progress: Progress = iter,
    called: str | None = None,
) -> StoredExpert:
    """Write another tool's fine-tuning as an expert; its record lists the source, file by file.

    Args:
        source: Directory or hub id of a PEFT adapter or a full checkpoint.
        out: Directory of the expert; its last part is the name.
        base: Directory or hub id of the base; the one that an adapter's configuration names if not given.
        revision: Branch, tag or commit of the base on the hub.
        tasks: Names of the tasks that it was trained on.
        overwrite: Replace an expert that is there.
        called: What the record calls the source, if not `source`.

    Raises:
        FileExistsError: `out` is there and may not be replaced; nothing has been read yet.
        FileNotFoundError: The source or the base was not found.
        ValueError: The format is not known, or a weight does not fit the base; nothing is written then.
    """
    check_target(out, overwrite)
    directory = _find(source)
    adapter = AdapterFiles(directory) if (directory / CONFIG_FILE).is_file() else None
    opened = open_base(source, adapter, base, revision)
    if adapter is None:
        imported = read_full_checkpoint(directory, opened, progress)
        format, files = "full checkpoint", weight_files(directory)
    else:
        imported, format, files = read_peft(adapter, opened), "PEFT adapter", [directory / CONFIG_FILE, adapter.file]
    hashes = {file.name: file_hash(file) for file in files}
    origin = {"id": called or str(source), "revision": None, "format": format, "sha256": hashes}

    def checked() -> Iterator[tuple[str, Delta]]:
        for name, delta in imported.deltas:
            opened.structure.check(name, delta.shape, str(source))
            yield name, delta
        # `write_expert` writes the record, which holds `origin`, after the last delta.
        if isinstance(imported.deltas, CheckpointDeltas | AskedDeltas):
            origin.update(imported.deltas.record())

    record = make_record(imported.kind, opened.facts, hyperparameters=imported.settings, tasks=tasks)
    write_expert(out, checked(), record | {"source": origin}, overwrite)
    return open_expert(out)


def open_base(
    source: str | Path, adapter: AdapterFiles | None, base: str | Path | Base | None, revision: str | None
) -> Base:
    named = adapter.base if adapter else None
    if base is None:
        if adapter is None or named is None:
            raise ValueError(f"{source} does not name its base; give it with base, a directory or a hub id")
        base, revision = named, revision or adapter.revision
    elif named is not None and not isinstance(base, Base) and Path(named).name != Path(base).name:
        log.warning("%s names %s as its base; it is imported as an expert of %s instead", source, named, base)
    return Base.open(base, revision=revision)


def _find(place: str | Path) -> Path:
    directory = Path(place).expanduser()
    if directory.is_file():
        raise ValueError(f"{place} is a file; give the directory that holds it and the files beside it")
    if not directory.is_dir():
        advice = "give the directory of a fine-tuning, or a hub id while the hub is reachable"
        directory = fetch_from_hub("source", str(place), None, _FETCHED, advice)
    if not any((directory / file).is_file() for file in (CONFIG_FILE, "config.json")):
        names = sorted(path.name for path in directory.iterdir())[:6]
        raise ValueError(
            f"{place} holds no fine-tuning of a known format: looked for {CONFIG_FILE} (a PEFT adapter) and "
            f"config.json with *.safetensors (a full checkpoint); it has {', '.join(names) or 'no files'}"
        )
    return directory
