"""Pull experts from a repository of the hub into a library, after checking every byte against its hash.

The files go into a temporary directory beside the library first, so a library never holds an unchecked file. They are
moved unchanged: `pull` returns their commit and does not write it into the records.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modular_experts.hub.repository import HubRepository, look
from modular_experts.library import StoredExpert, check_target, new_directory, open_expert, open_statistics
from modular_experts.library.atomic import is_name
from modular_experts.library.record import RECORD_FILE, files_of, read_record
from modular_experts.library.statistics import FOLDER, kinds_of_statistics
from modular_experts.progress import Progress

__all__ = ["Pulled", "pull"]


@dataclass(frozen=True)
class Pulled:
    """What a pull wrote.

    Attributes:
        experts: The experts that were written.
        present: Experts that the library had already, undamaged and with the same content hash.
        commit: The commit that they come from.
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
        out: Directory of the library; made if it does not exist.
        experts: Names of the experts; all if not given.
        revision: Branch, tag or commit; the main branch if not given.
        overwrite: Replace experts of the same name and other contents.
        statistics: Fetch the statistics of the written experts too.
        progress: Iterator wrapper, e.g. `tqdm`, for checking the experts.

    Raises:
        ValueError: The repository holds no such expert, or one that is damaged.
        FileExistsError: The library has an expert of that name with other contents.
        OSError: The hub was not reached, or has no such repository or revision that this user may see.
    """
    library = Path(os.path.abspath(Path(out).expanduser()))
    repository = look(repo_id, revision)
    names = repository.choose(experts)
    for name in names:
        check_target(library / name, overwrite=True)
    # On the library's own disk, where moving a file costs nothing.
    beside = next(place for place in (library, *library.parents) if place.is_dir())
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=beside) as temporary:
        place = Path(temporary)
        repository.fetch([f"{name}/{RECORD_FILE}" for name in names], place)
        files, present = {}, []
        for name in names:
            try:
                record = read_record(place / name / RECORD_FILE)
            except ValueError as error:
                raise _damaged(repository, place, name, error) from error
            if missing := repository.missing(name, record):
                raise ValueError(f"{name} in {repo_id} is not a complete expert: {missing[0]} is missing")
            if _is_present(library / name, record, repo_id, overwrite):
                present.append(name)
            else:
                files[name] = _paths(repository, name, record, statistics)
        repository.fetch([path for paths in files.values() for path in paths], place)
        for name in progress(list(files)):
            try:
                expert = open_expert(place / name)
                expert.verify()
                for kind in kinds_of_statistics(expert):
                    stored = open_statistics(expert, kind)
                    for weight in stored:
                        stored[weight]  # reading a tensor checks it
            except (ValueError, OSError) as error:
                raise _damaged(repository, place, name, error) from error
        for name, paths in files.items():
            with new_directory(library / name, overwrite) as directory:
                for path in paths:
                    inside = path.partition("/")[2]
                    (directory / inside).parent.mkdir(exist_ok=True)
                    shutil.move(place / path, directory / inside)
    assert repository.commit is not None
    written, there = ([open_expert(library / name) for name in group] for group in (files, present))
    return Pulled(written, there, repository.commit)


def _is_present(target: Path, record: Mapping[str, Any], repo_id: str, overwrite: bool) -> bool:
    """Return whether the library has an expert as the repository has it.

    Raises:
        FileExistsError: It has another expert of that name, or a damaged one, which may not be replaced.
    """
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
        problem = f"with other contents ({there.content_hash[:12]}, in {repo_id} {record['content_hash'][:12]})"
    if not overwrite:
        raise FileExistsError(
            f"{target} exists already, {problem}; pull into another library, or replace it with overwrite: true"
        )
    return False


def _paths(repository: HubRepository, name: str, record: Mapping[str, Any], statistics: bool) -> list[str]:
    """Return the paths of an expert's files in the repository."""
    paths = [f"{name}/{file}" for file in (*files_of(record), RECORD_FILE)]
    folder, suffix = f"{name}/{FOLDER}/", ".safetensors"
    for path in sorted(repository.files) if statistics else ():
        kind = path.removeprefix(folder).removesuffix(suffix)
        if path == f"{folder}{kind}{suffix}" and is_name(kind):
            paths.append(path)
    return paths


def _damaged(repository: HubRepository, place: Path, name: str, error: Exception) -> ValueError:
    reason = str(error).replace(f"{place}{os.sep}", "").partition("; take it from a copy")[0]
    return ValueError(
        f"{name} of {repository.repo_id} at commit {str(repository.commit)[:12]} was not written, nor any other: "
        f"{reason}; pull again, and if that does not help, ask its owner to push it again"
    )
