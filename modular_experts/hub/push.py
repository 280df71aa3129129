"""Push experts and a card about them into a repository of the hub, in one commit, after reading and checking them.

Only the files that an expert consists of go, and its statistics on request; any other file in its directory stays.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from modular_experts.hub.card import CARD_FILE, CardEntry, is_ours, model_card
from modular_experts.hub.repository import (
    HubRepository,
    hub_errors,
    is_hub_model,
    look,
    may_be_hub_model,
)
from modular_experts.library import Library, StoredExpert, open_experts, open_statistics
from modular_experts.library.atomic import is_name
from modular_experts.library.record import DELTA_FILE, RECORD_FILE, STATE_FILE, files_of, read_record
from modular_experts.library.statistics import FOLDER, kinds_of_statistics
from modular_experts.progress import Progress

__all__ = ["Pushed", "push"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pushed:
    """What a push wrote, or would write.

    Attributes:
        files: The files beside the card, by their path in the repository.
        removed: Files that were removed: what a replaced expert had and its successor does not have.
        present: Experts that the repository had already, with the same record and so the same deltas.
        card: The card; None if the repository has one with a text of its own, which stays.
        address: The page of the repository, or of the commit.
        commit: The commit; None after a dry run, or if there was nothing to write.
    """

    files: Mapping[str, Path]
    removed: Sequence[str]
    present: Sequence[str]
    card: str | None
    address: str
    commit: str | None = None

    @property
    def experts(self) -> list[str]:
        """The names of the experts whose files are among these."""
        return sorted({path.split("/")[0] for path in self.files} - set(self.present))


def push(
    experts: Sequence[str | Path] | str | Path,
    repo_id: str,
    private: bool = False,
    branch: str | None = None,
    message: str | None = None,
    overwrite: bool = False,
    statistics: bool = False,
    dry_run: bool = False,
    progress: Progress = iter,
) -> Pushed:
    """Write experts and a card into a repository of the hub.

    Args:
        experts: Directories of experts, or the directory of a library, for all its experts.
        repo_id: `owner/name`; made if it does not exist.
        private: Make the repository private; one that exists must be.
        branch: Branch to write to, made if it does not exist; the main branch if not given.
        message: Subject of the commit.
        overwrite: Replace experts of the same name.
        statistics: Push the experts' statistics too.
        dry_run: Check everything and write nothing. Where the hub is out of reach, assume an empty repository.
        progress: Iterator wrapper, e.g. `tqdm`, for reading the experts.

    Raises:
        ValueError: An expert is damaged, there is none, or two have the same name.
        OSError: The hub was not reached, does not let this user write, or has another expert of that name.
    """
    opened = _open(experts)
    files = _read_files(opened, statistics, progress)
    is_model: Callable[[str], bool] = cache(is_hub_model)
    try:
        repository = look(repo_id, branch, writing=True)
    except ConnectionError as error:
        if not dry_run:
            raise
        log.warning("%s (this shows what a repository that is not there yet would get)", error)
        repository, is_model = HubRepository(repo_id), may_be_hub_model
    if private and repository.commit and not repository.private:
        raise PermissionError(f"{repo_id} is public, and private was asked for; make it private on its page first")
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        cards = [CARD_FILE] if CARD_FILE in repository.files else []
        theirs = [name for name in repository.folders() if is_name(name)]
        repository.fetch([*cards, *(f"{name}/{RECORD_FILE}" for name in theirs)], place)
        present = [expert.name for expert in opened if _is_present(expert, place, repo_id, overwrite)]
        others = [name for name in theirs if name not in {expert.name for expert in opened}]
        entries = [CardEntry.of(expert) for expert in opened] + _entries(repository, others, place)
        earlier = "".join((place / name).read_text(encoding="utf-8", errors="replace") for name in cards)
    # Statistics (`<expert>/statistics/<kind>`) go even if the repository has their expert already.
    new = {path: file for path, file in files.items() if path.count("/") > 1 or path.split("/")[0] not in present}
    replaced = {expert.name for expert in opened} - set(present)
    removed = [
        path
        for path in repository.files
        if path.split("/")[0] in replaced
        and path.split("/")[1:2] in ([FOLDER], [DELTA_FILE], [STATE_FILE])
        and path not in new
    ]
    entries = [replace(entry, hub_base=_hub_base(entry, is_model)) for entry in entries]
    card = model_card(repo_id, entries, earlier) if is_ours(earlier) else None
    plan = Pushed(new, removed, present, card, f"{HfApi().endpoint}/{repo_id}")
    if dry_run or not (new or removed or card not in (None, earlier)):
        return plan
    return _commit(repository, plan, private, branch, message)


def _open(experts: Sequence[str | Path] | str | Path) -> list[StoredExpert]:
    if isinstance(experts, str | Path):
        library = Library(experts)
        for name, problem in library.incomplete().items():
            raise ValueError(f"{library.directory / name} cannot be pushed: {problem}; remove it, or name the experts")
        if not library:
            raise ValueError(f"{experts} holds no expert, so there is nothing to push")
        experts = [library.directory / name for name in library]
    opened = open_experts(experts, mergeable=False)
    names = [expert.name for expert in opened]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"two of the experts are called {name}, and a repository holds one of a name; push one of them"
            )
    return opened


def _read_files(experts: Sequence[StoredExpert], statistics: bool, progress: Progress) -> dict[str, Path]:
    """Return the files of experts by their path in the repository, after reading all that is in them."""
    files: dict[str, Path] = {}
    by_name = {expert.name: expert for expert in experts}
    for name in progress(list(by_name)):
        expert = by_name[name]
        expert.verify()
        files |= {f"{name}/{file}": expert.path / file for file in (*files_of(expert.record), RECORD_FILE)}
        for kind in kinds_of_statistics(expert) if statistics else ():
            stored = open_statistics(expert, kind)
            for weight in stored:
                stored[weight]  # reading a tensor checks it
            files[f"{name}/{FOLDER}/{kind}.safetensors"] = stored.file
    return files


def _is_present(expert: StoredExpert, place: Path, repo_id: str, overwrite: bool) -> bool:
    """Return whether the repository has the expert with the same record, which holds the hash of its contents.

    Raises:
        FileExistsError: It has another expert of that name, which may not be replaced.
    """
    record = place / expert.name / RECORD_FILE
    if not record.is_file():
        return False
    if record.read_bytes() == (expert.path / RECORD_FILE).read_bytes():
        return True
    if not overwrite:
        raise FileExistsError(
            f"{repo_id} has another expert called {expert.name}; give yours another name, or replace it with "
            "overwrite: true"
        )
    return False


def _entries(repository: HubRepository, names: Sequence[str], place: Path) -> list[CardEntry]:
    """Return the card's entries of the complete experts that the repository has beside those that are pushed."""
    entries = []
    for name in names:
        try:
            record = read_record(place / name / RECORD_FILE)
        except ValueError as error:
            raise ValueError(f"{str(error).replace(str(place), repository.repo_id)}; remove it there first") from error
        if not repository.missing(name, record):
            size = sum(repository.files[f"{name}/{file}"] for file in (*files_of(record), RECORD_FILE))
            kept = repository.kept_share(name) if DELTA_FILE in files_of(record) else None
            entries.append(CardEntry(name, record, kept, size))
    return entries


def _hub_base(entry: CardEntry, is_model: Callable[[str], bool]) -> str | None:
    base = entry.record["base"].get("id")
    return base if isinstance(base, str) and is_model(base) else None


def _commit(repository: HubRepository, plan: Pushed, private: bool, branch: str | None, message: str | None) -> Pushed:
    """Write a plan in one commit on top of the one that it was made for."""
    api, repo_id = HfApi(), repository.repo_id
    operations: list[Any] = [CommitOperationAdd(path, str(file)) for path, file in plan.files.items()]
    operations += [CommitOperationAdd(CARD_FILE, plan.card.encode())] if plan.card else []
    operations += [CommitOperationDelete(path) for path in plan.removed]
    names = ", ".join(dict.fromkeys(path.split("/")[0] for path in plan.files))
    with hub_errors(repo_id, branch, writing=True):
        if repository.commit is None:
            api.create_repo(repo_id, private=private or None, exist_ok=True)
        if branch and (repository.commit is None or not repository.has_revision):
            api.create_branch(repo_id, branch=branch, exist_ok=True)
        done = api.create_commit(
            repo_id,
            operations,
            commit_message=message or f"Add {names or CARD_FILE}",
            revision=branch,
            parent_commit=repository.commit,
        )
    return replace(plan, commit=done.oid, address=str(done.commit_url))
