"""Import another tool's fine-tuning as an expert: find its format, read it, check it against its base, and write it."""

import glob
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from modular_experts.base import Base
from modular_experts.base.files import found_or_fetched, weight_files
from modular_experts.deltas import Delta
from modular_experts.injection.task_heads import state_of_head
from modular_experts.interop.full_checkpoint import CheckpointDeltas, read_full_checkpoint
from modular_experts.interop.peft import read_peft
from modular_experts.interop.peft.asked import AskedDeltas
from modular_experts.interop.peft.files import CONFIG_FILE, AdapterFiles
from modular_experts.library import StoredExpert, check_target, make_record, open_expert, write_expert
from modular_experts.library.record import RECORD_FILE
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
        tasks: Names of the tasks that it was trained on; if not given, the expert's own name, as no adapter records
            its tasks.
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
        format = "full checkpoint"
        files = weight_files(directory)
    else:
        imported = read_peft(adapter, opened)
        format = "PEFT adapter"
        files = [directory / CONFIG_FILE, adapter.file]
    hashes = {file.name: file_hash(file) for file in files}
    origin = {"id": called or str(source), "revision": None, "format": format, "sha256": hashes}

    def checked() -> Iterator[tuple[str, Delta]]:
        for name, delta in imported.deltas:
            opened.structure.check(name, delta.shape, str(source))
            yield name, delta
        # `write_expert` writes the record, which holds `origin`, after the last delta.
        if isinstance(imported.deltas, CheckpointDeltas | AskedDeltas):
            origin.update(imported.deltas.record())

    of_tasks = list(tasks) or [Path(out).name]
    record = make_record(imported.kind, opened.facts, hyperparameters=imported.settings, tasks=of_tasks)
    state = state_of_head(opened.structure.model, imported.head, of_tasks) if imported.head else None
    write_expert(out, checked(), record | {"source": origin}, overwrite, state=state)
    return open_expert(out)


@dataclass(frozen=True)
class Imported:
    """What became of several sources: experts, names of those that were there already, and why one failed."""

    experts: list[StoredExpert] = field(default_factory=list)
    present: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def import_experts(
    sources: Sequence[str | Path],
    library: str | Path,
    base: str | Path | Base | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    progress: Progress = iter,
) -> Imported:
    """Write several fine-tunings as experts of a library, each named after its source; one that fails stops no other.

    Args:
        sources: Directories, hub ids, or patterns of directories such as `peft/*`, which leave out files.
        library: Directory of the library.
        base, revision, overwrite: As for `import_expert`, for all of them. An expert of the same base that is there
            and was made of the same files is left alone.
        progress: Iterator wrapper around the sources, each with the name of its expert.

    Raises:
        ValueError: There is no source.
    """
    places = found_sources(sources)
    if not places:
        raise ValueError(f"no directory is called {' or '.join(map(str, sources))}; give directories or hub ids")
    done = Imported()
    names = list(map(name_for, places))
    above = [os.path.basename(os.path.dirname(os.path.abspath(place))) for place in places]
    # Where two would have one name, the directory above tells them apart.
    names = [
        name if names.count(name) == 1 else name_for(f"{parent}-{name}")
        for name, parent in zip(names, above, strict=True)
    ]
    for place, name in progress([*zip(places, names, strict=True)]):
        target = Path(library, name)
        try:
            if names.count(name) > 1:
                raise ValueError(
                    f"another of the sources would be called {name}, too; import each of them alone, with a name of "
                    "its own as the last part of out"
                )
            if not overwrite and _is_made_of(target, place, base, revision):
                done.present.append(name)
                done.experts.append(open_expert(target))
            else:
                done.experts.append(import_expert(place, target, base, revision, overwrite=overwrite))
        except (OSError, ValueError) as error:
            done.failed[place] = str(error)
            log.warning("%s: %s", place, error)
    return done


def found_sources(sources: Sequence[str | Path]) -> list[str]:
    """Return the directories and hub ids that words name, patterns spelt out; of several words, files are left out."""
    places = []
    for word in map(str, sources):
        place = os.path.expanduser(word)
        places += sorted(glob.glob(place)) if glob.has_magic(word) and not os.path.exists(place) else [word]
    unlike = {os.path.normpath(place): place for place in places}.values()
    return [place for place in unlike if len(places) == 1 or not Path(place).is_file()]


def name_for(place: str | Path) -> str:
    """Return the last part of a directory or hub id as a name that an expert may have; a `checkpoint-100` gets two."""
    parent, last = os.path.split(os.path.abspath(place))
    if re.fullmatch(r"checkpoint-\d+", last):
        last = f"{os.path.basename(parent)}-{last}"
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).lstrip("._-")[:64] or "adapter"


def _is_made_of(target: Path, place: str, base: str | Path | Base | None, revision: str | None) -> bool:
    """Return whether an expert is there, was made of the files that a directory holds, and is of the same base."""
    if not (target / RECORD_FILE).is_file():
        return False
    record = open_expert(target).record
    directory = Path(place).expanduser()
    hashes = (record.get("source") or {}).get("sha256") or {}
    files = {name: directory / name for name in hashes}
    if not files or not all(file.is_file() and file_hash(file) == hashes[name] for name, file in files.items()):
        return False
    adapter = AdapterFiles(directory) if CONFIG_FILE in files else None
    return open_base(place, adapter, base, revision).fingerprint == record["base"]["fingerprint"]


def open_base(
    source: str | Path, adapter: AdapterFiles | None, base: str | Path | Base | None, revision: str | None
) -> Base:
    named = adapter.base if adapter else None
    if base is None:
        if adapter is None or named is None:
            raise ValueError(f"{source} does not name its base; give it with base, a directory or a hub id")
        base = named
        revision = revision or adapter.revision
    elif named is not None and not isinstance(base, Base) and Path(named).name != Path(base).name:
        log.warning("%s names %s as its base; it is imported as an expert of %s instead", source, named, base)
    return Base.open(base, revision=revision)


def _find(place: str | Path) -> Path:
    if Path(place).expanduser().is_file():
        raise ValueError(f"{place} is a file; give the directory that holds it and the files beside it")
    advice = "give the directory of a fine-tuning, or a hub id while the hub is reachable"
    directory = found_or_fetched("source", str(place), None, _FETCHED, advice)
    if not any((directory / file).is_file() for file in (CONFIG_FILE, "config.json")):
        names = sorted(path.name for path in directory.iterdir())[:6]
        raise ValueError(
            f"{place} holds no fine-tuning of a known format: looked for {CONFIG_FILE} (a PEFT adapter) and "
            f"config.json with *.safetensors (a full checkpoint); it has {', '.join(names) or 'no files'}"
        )
    return directory
