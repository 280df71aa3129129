"""Pull: experts from a repository of the hub into a library, once every byte was checked against its hash.

They are fetched into a temporary directory beside the library first, so a library never holds what was not checked. The
files are moved as they are: the commit that they are from is told, not written into the record.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modular_experts.hub.repository import HubRepository, look
from modular_experts.library import StoredExpert, check_target, new_directory, open_expert, open_statistics
from modular_experts.library.atomic import is_name
from modular_experts.library.record import DELTA_FILE, RECORD_FILE, STATE_FILE, read_record
from modular_experts.library.statistics import FOLDER, kinds_of_statistics
from modular_experts.progress import Progress

__all__ = ["Pulled", "pull"]


@dataclass(frozen=True)
class Pulled:
    """What a pull wrote.

    Attributes:
        experts: The experts that were written.
        present: Experts that were there already, intact and with the same content hash.
        commit: The commit that they are from.
    """

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
        out: Directory of the library; made if it is not there.
        experts: Names of the experts; all if none are named.
        revision: Branch, tag or commit; the main branch if none is given.
        overwrite: Whether experts of the same name and other contents may be replaced.
        statistics: Whether to fetch the statistics of the experts that are written too.
        progress: Wraps the names of the experts while they are checked.

    Raises:
        ValueError: The repository holds no such expert, or one that is damaged.
        FileExistsError: The library has an expert of that name with other contents.
        OSError: The hub was not reached, or has no such repository or revision that one may see.
    """
    library = Path(os.path.abspath(Path(out).expanduser()))
    seen = look(repo_id, revision)
    names = seen.choose(experts)
    for name in names:
        check_target(library / name, overwrite=True)
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=_nearest(library)) as temporary:
        place = Path(temporary)
        seen.fetch([f"{name}/{RECORD_FILE}" for name in names], place)
        present = [name for name in names if _is_present(seen, place, library / name, overwrite)]
        wanted = [name for name in names if name not in present]
        seen.fetch([file for name in wanted for file in _files(seen, name, statistics)], place)
        for name in progress(wanted):
            _check(seen, place, name)
        for name in wanted:
            _move(place / name, library / name, overwrite, _files(seen, name, statistics))
    written, there = ([open_expert(library / name) for name in group] for group in (wanted, present))
    assert seen.commit is not None
    return Pulled(written, there, seen.commit)


def _nearest(library: Path) -> Path:
    """Return the nearest directory that is there: on the same disk, so that moving costs nothing."""
    return next(place for place in (library, *library.parents) if place.is_dir())


def _is_present(seen: HubRepository, place: Path, target: Path, overwrite: bool) -> bool:
    """Return whether an expert is in the library as it is in the repository; refuse another one of that name."""
    try:
        record = read_record(place / target.name / RECORD_FILE)
    except ValueError as error:
        raise _damaged(seen, place, target.name, error) from error
    if not target.exists():
        return False
    try:
        there = open_expert(target)
        there.verify()
    except (ValueError, OSError):
        problem = "and is damaged"
    else:
        if there.content_hash == record["content_hash"]:
            return True
        problem = f"with other contents ({there.content_hash[:12]}, in {seen.repo_id} {record['content_hash'][:12]})"
    if not overwrite:
        raise FileExistsError(
            f"{target} exists already, {problem}; pull into another library, or replace it with overwrite: true"
        )
    return False


def _files(seen: HubRepository, name: str, statistics: bool) -> list[str]:
    """Return the paths of an expert's files."""
    folder = f"{name}/{FOLDER}/"
    kinds = [path.removeprefix(folder).removesuffix(".safetensors") for path in seen.files if path.startswith(folder)]
    found = [f"{folder}{kind}.safetensors" for kind in sorted(kinds) if is_name(kind)] if statistics else []
    own = [f"{name}/{file}" for file in (DELTA_FILE, STATE_FILE, RECORD_FILE)]
    return [path for path in (*own, *found) if path in seen.files]


def _check(seen: HubRepository, place: Path, name: str) -> None:
    try:
        expert = open_expert(place / name)
        expert.verify()
        for kind in kinds_of_statistics(expert):
            stored = open_statistics(expert, kind)
            for weight in stored:
                stored[weight]  # a tensor is checked when it is read
    except (ValueError, OSError) as error:
        raise _damaged(seen, place, name, error) from error


def _damaged(seen: HubRepository, place: Path, name: str, error: Exception) -> ValueError:
    reason = str(error).replace(f"{place}{os.sep}", "").partition("; take it from a copy")[0]
    return ValueError(
        f"{name} of {seen.repo_id} at commit {str(seen.commit)[:12]} was not written, nor any other: {reason}; pull "
        "again, and if that does not help, ask its owner to push it again"
    )


def _move(source: Path, target: Path, overwrite: bool, files: Sequence[str]) -> None:
    with new_directory(target, overwrite) as directory:
        for path in files:
            inside = path.partition("/")[2]
            (directory / inside).parent.mkdir(exist_ok=True)
            shutil.move(source / inside, directory / inside)
