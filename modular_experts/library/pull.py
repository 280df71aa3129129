"""Pull experts from a repository of the hub into a library, after checking every byte against its hash."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modular_experts.library import StoredExpert, check_target, new_directory, open_expert
from modular_experts.library.atomic import is_name
from modular_experts.library.hub import HubRepository, check_contents, look
from modular_experts.library.record import RECORD_FILE, ROUTED, files_of, read_record
from modular_experts.library.state import INPUTS_FILE
from modular_experts.library.statistics import FOLDER
from modular_experts.progress import Progress


@dataclass(frozen=True)
class Pulled:
    """The experts that a pull wrote, those that the library had already (by content hash), and their commit."""

    experts: Sequence[StoredExpert]
    present: Sequence[StoredExpert]
    commit: str


def pull(
    repo_id: str,
    out: str | Path,
    experts: Sequence[str] | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    statistics: bool = False,
    progress: Progress = iter,
) -> Pulled:
    """Fetch experts from a repository of the hub into a library.

    Args:
        repo_id: `owner/name`.
        out: Directory of the library; made if it does not exist.
        experts: Names of the experts; all if not given. The experts behind a router come with it.
        revision: Branch, tag or commit; the main branch if not given.
        overwrite: Replace experts of the same name and other contents.
        statistics: Fetch the statistics of the written experts too.

    Raises:
        ValueError: The repository holds no such expert, or one that is damaged.
        FileExistsError: The library has an expert of that name with other contents.
        OSError: The hub was not reached, or has no such repository or revision that this user may see.
    """
    library = Path(os.path.abspath(Path(out).expanduser()))
    repository = look(repo_id, revision)
    names = repository.choose(experts)
    # On the library's own disk, where moving a file costs nothing.
    beside = next(place for place in (library, *library.parents) if place.is_dir())
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=beside) as temporary:
        place = Path(temporary)
        records = _fetch_records(repository, names, library, place)
        files = _wanted(repository, records, library, overwrite, statistics)
        repository.fetch([path for paths in files.values() for path in paths], place)
        for name in progress(list(files)):
            with _told(repository, place, name):
                check_contents(open_expert(place / name), statistics=True)
        for name, paths in files.items():
            with new_directory(library / name, overwrite) as directory:
                for path in paths:
                    target = directory / path.partition("/")[2]
                    target.parent.mkdir(exist_ok=True)
                    shutil.move(place / path, target)
    assert repository.commit is not None
    present = [open_expert(library / name) for name in records if name not in files]
    return Pulled([open_expert(library / name) for name in files], present, repository.commit)


def _fetch_records(
    repository: HubRepository, names: Sequence[str], library: Path, place: Path
) -> dict[str, dict[str, Any]]:
    records: dict[str, dict[str, Any]] = {}
    left = list(names)
    while left:
        repository.fetch([f"{name}/{RECORD_FILE}" for name in left], place)
        behind: list[str] = []
        for name in left:
            check_target(library / name, overwrite=True)
            with _told(repository, place, name):
                records[name] = read_record(place / name / RECORD_FILE)
            if records[name]["kind"] == ROUTED:
                behind += repository.choose([parent["name"] for parent in records[name]["parents"]])
        left = [name for name in dict.fromkeys(behind) if name not in records]
    return records


def _wanted(
    repository: HubRepository,
    records: Mapping[str, Mapping[str, Any]],
    library: Path,
    overwrite: bool,
    statistics: bool,
) -> dict[str, list[str]]:
    files: dict[str, list[str]] = {}
    for name, record in records.items():
        if missing := repository.missing(name, record):
            raise ValueError(f"{name} in {repository.repo_id} is not a complete expert: {missing[0]} is missing")
        if _is_present(library / name, record):
            continue
        if (library / name).exists() and not overwrite:
            raise FileExistsError(
                f"{library / name} exists already, damaged or with other contents than in {repository.repo_id}; pull "
                "into another library, or replace it with `overwrite=True`"
            )
        files[name] = [f"{name}/{file}" for file in (*files_of(record), RECORD_FILE)]
        files[name] += [kept for kept in [f"{name}/{INPUTS_FILE}"] if "inputs" in record and kept in repository.files]
        for path in sorted(repository.files) if statistics else ():
            kind = path.removeprefix(f"{name}/{FOLDER}/").removesuffix(".safetensors")
            if path == f"{name}/{FOLDER}/{kind}.safetensors" and is_name(kind):
                files[name].append(path)
    return files


@contextmanager
def _told(repository: HubRepository, place: Path, name: str) -> Iterator[None]:
    """Name the repository instead of the temporary place in the error of a damaged file."""
    try:
        yield
    except (ValueError, OSError) as error:
        reason = str(error).replace(f"{place}{os.sep}", "").partition("; take it from a copy")[0]
        which = f"{name} of {repository.repo_id} at commit {str(repository.commit)[:12]}"
        raise ValueError(
            f"{which} was not written, nor any other: {reason}; pull again, or ask its owner to push"
        ) from error


def _is_present(target: Path, record: Mapping[str, Any]) -> bool:
    try:
        there = open_expert(target)
        there.verify()
    except (ValueError, OSError):
        return False
    return there.content_hash == record["content_hash"]
