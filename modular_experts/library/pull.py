"""Pull experts from a repository of the hub into a library, after checking every byte against its hash."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from modular_experts.library import StoredExpert, check_target, new_directory, open_expert
from modular_experts.library.hub import HubRepository, check_contents, find_repository
from modular_experts.library.kept_inputs import INPUTS_FILE
from modular_experts.library.names import is_name
from modular_experts.library.record import RECORD_FILE, ROUTED, Facts, Record, files_of, read_record
from modular_experts.library.signing import SIGNATURE_FILE
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
    repository = find_repository(repo_id, revision)
    names = repository.choose(experts)
    # On the library's own disk, where moving a file costs nothing.
    beside = next(place for place in (library, *library.parents) if place.is_dir())
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=beside) as temporary:
        place = Path(temporary)
        records = _fetch_records(repository, names, library, place)
        new = [name for name, record in records.items() if not _is_present(library / name, record)]
        for name in new:
            check_target(library / name, overwrite)
        repository.fetch([path for name in new for path in _files(repository, name, records[name], statistics)], place)
        for name in progress(new):
            with _names_the_repository(repository, place, name):
                check_contents(open_expert(place / name), statistics=True)
        for name in new:
            with new_directory(library / name, overwrite) as directory:
                shutil.copytree(place / name, directory, copy_function=shutil.move, dirs_exist_ok=True)
    assert repository.commit is not None
    present = [open_expert(library / name) for name in records if name not in new]
    return Pulled([open_expert(library / name) for name in new], present, repository.commit)


def _fetch_records(repository: HubRepository, names: Sequence[str], library: Path, place: Path) -> dict[str, Record]:
    """Return the records of experts and of those behind routers among them, after a check of each target."""
    records: dict[str, Record] = {}
    left = list(names)
    while left:
        repository.fetch([f"{name}/{RECORD_FILE}" for name in left], place)
        behind: list[str] = []
        for name in left:
            check_target(library / name, overwrite=True)
            with _names_the_repository(repository, place, name):
                records[name] = read_record(place / name / RECORD_FILE)
            if records[name]["kind"] == ROUTED:
                behind += repository.choose([parent["name"] for parent in records[name]["parents"]])
        left = [name for name in dict.fromkeys(behind) if name not in records]
    return records


def _files(repository: HubRepository, name: str, record: Facts, statistics: bool) -> list[str]:
    """Return the paths of an expert's own files in a repository, beside its record."""
    files = [f"{name}/{file}" for file in files_of(record)]
    if "inputs" in record:
        files.append(f"{name}/{INPUTS_FILE}")
    if f"{name}/{SIGNATURE_FILE}" in repository.files:
        files.append(f"{name}/{SIGNATURE_FILE}")
    for path in repository.files if statistics else ():
        kind = path.removeprefix(f"{name}/{FOLDER}/").removesuffix(".safetensors")
        if path == f"{name}/{FOLDER}/{kind}.safetensors" and is_name(kind):
            files.append(path)
    return files


@contextmanager
def _names_the_repository(repository: HubRepository, place: Path, name: str) -> Iterator[None]:
    """Name the repository instead of the temporary place in the error of a damaged file."""
    try:
        yield
    except (ValueError, OSError) as error:
        reason = str(error).replace(f"{place}{os.sep}", "").partition("; take it from a copy")[0]
        which = f"{name} of {repository.repo_id} at commit {str(repository.commit)[:12]}"
        raise ValueError(
            f"{which} was not written, nor any other: {reason}; pull again, or ask its owner to push"
        ) from error


def _is_present(target: Path, record: Facts) -> bool:
    """Return whether the library has this expert, undamaged."""
    try:
        there = open_expert(target)
        there.verify()
    except (ValueError, OSError):
        return False
    return there.content_hash == record["content_hash"]
