"""Push: experts and a card about them into a repository of the hub, in one commit, once all was read and checked.

Only the files that an expert is made of go, and its statistics if they are asked for; what else lies beside them stays.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from modular_experts.hub.card import CARD_FILE, CardEntry, is_ours, model_card
from modular_experts.hub.repository import HubRepository, hub_errors, is_hub_model, look_before_push, may_be_hub_model
from modular_experts.library import Library, StoredExpert, open_experts, open_statistics
from modular_experts.library.record import RECORD_FILE, files_of, read_record
from modular_experts.library.statistics import FOLDER, kinds_of_statistics
from modular_experts.progress import Progress

__all__ = ["Pushed", "push"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pushed:
    """What a push wrote, or would write.

    Attributes:
        files: The files beside the card, by their path in the repository.
        removed: Files that went: statistics of an expert that was replaced.
        present: Experts that the repository had already, with the same record and so the same deltas.
        card: The card; none if the repository has one whose text is not ours, which stays.
        address: Where the repository, or the commit, can be seen.
        commit: The commit; none after a dry run, or if there was nothing to write.
    """

    files: Mapping[str, Path]
    removed: Sequence[str]
    present: Sequence[str]
    card: str | None
    address: str
    commit: str | None = None
    is_needed: bool = field(default=True, repr=False)

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
        experts: Directories of experts, or the directory of a library whose experts are all meant.
        repo_id: `owner/name`; made if it is not there.
        private: Make it private; one that is there must be.
        branch: Branch to write to, made if it is not there; the main one if none is given.
        message: Subject of the commit.
        overwrite: Whether experts of the same name may be replaced.
        statistics: Whether the experts' statistics go too.
        dry_run: Look at everything and write nothing; without the hub, as if the repository were not there yet.
        progress: Wraps the names of the experts while they are read.

    Raises:
        ValueError: An expert is damaged, or there is none, or two have the same name.
        OSError: The hub was not reached, or does not let one write; or it has another expert of that name.
    """
    opened = _open(experts)
    files = _files(opened, statistics, progress)
    seen, is_model = _look(repo_id, branch, dry_run)
    if private and seen.commit and not seen.private:
        raise PermissionError(f"{repo_id} is public, and private was asked for; make it private on its page first")
    plan = _plan(seen, opened, files, overwrite, is_model)
    if dry_run or not plan.is_needed:
        return plan
    return _send(seen, plan, private, branch, message)


def _open(experts: Sequence[str | Path] | str | Path) -> list[StoredExpert]:
    opened = open_experts(_directories(experts) if isinstance(experts, str | Path) else experts, mergeable=False)
    names = [expert.name for expert in opened]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ValueError(
            f"two of the experts are called {twice}, and a repository holds one of a name; push one of them"
        )
    return opened


def _directories(place: str | Path) -> list[Path]:
    library = Library(place)
    for name, problem in library.incomplete().items():
        raise ValueError(f"{library.directory / name} cannot be pushed: {problem}; remove it, or name the experts")
    if not library:
        raise ValueError(f"{place} holds no expert, so there is nothing to push")
    return [library.directory / name for name in library]


def _files(
    experts: Sequence[StoredExpert], statistics: bool, progress: Callable[[Sequence[str]], Iterable[str]]
) -> dict[str, Path]:
    """Return the files of experts by their path in the repository, once everything in them was read."""
    found: dict[str, Path] = {}
    by_name = {expert.name: expert for expert in experts}
    for name in progress(list(by_name)):
        expert = by_name[name]
        expert.verify()
        found |= {f"{name}/{file}": expert.path / file for file in (*expert.files, RECORD_FILE)}
        for kind in kinds_of_statistics(expert) if statistics else ():
            stored = open_statistics(expert, kind)
            for weight in stored:
                stored[weight]  # a tensor is checked when it is read
            found[f"{name}/{FOLDER}/{kind}.safetensors"] = stored.file
    return found


def _look(repo_id: str, branch: str | None, dry_run: bool) -> tuple[HubRepository, Callable[[str], bool]]:
    """Return what the repository holds, and what tells whether a base is a model of the hub."""
    try:
        return look_before_push(repo_id, branch), cache(is_hub_model)
    except ConnectionError as error:
        if not dry_run:
            raise
        log.warning("%s (this shows what a repository that is not there yet would get)", error)
        return HubRepository(repo_id), may_be_hub_model


def _plan(
    seen: HubRepository,
    experts: Sequence[StoredExpert],
    files: Mapping[str, Path],
    overwrite: bool,
    is_model: Callable[[str], bool],
) -> Pushed:
    mine, theirs = {expert.name for expert in experts}, seen.experts()
    cards = [CARD_FILE] if CARD_FILE in seen.files else []
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        seen.fetch([*cards, *(f"{name}/{RECORD_FILE}" for name in theirs)], place)
        present = [expert.name for expert in experts if _is_present(expert, place, seen.repo_id, overwrite)]
        entries = [CardEntry.of(expert) for expert in experts]
        entries += [_entry(seen, name, place) for name in theirs if name not in mine]
        earlier = "".join((place / name).read_text(encoding="utf-8", errors="replace") for name in cards)
    new = {path: file for path, file in files.items() if path.count("/") > 1 or path.split("/")[0] not in present}
    replaced = mine - set(present)
    removed = [
        path for path in seen.files if _is_statistics(path) and path.split("/")[0] in replaced and path not in new
    ]
    entries = [replace(entry, hub_base=_hub_base(entry.record, is_model)) for entry in entries]
    card = model_card(seen.repo_id, entries, earlier) if is_ours(earlier) else None
    needed = bool(new or removed or card not in (None, earlier))
    return Pushed(new, removed, present, card, f"{HfApi().endpoint}/{seen.repo_id}", is_needed=needed)


def _is_present(expert: StoredExpert, place: Path, repo_id: str, overwrite: bool) -> bool:
    """Return whether the repository has the expert with the same record; the record holds the hash of the deltas."""
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


def _is_statistics(path: str) -> bool:
    return path.split("/")[1:2] == [FOLDER]


def _entry(seen: HubRepository, name: str, place: Path) -> CardEntry:
    try:
        record = read_record(place / name / RECORD_FILE)
    except ValueError as error:
        raise ValueError(f"{str(error).replace(str(place), seen.repo_id)}; remove it there first") from error
    size = sum(seen.files.get(f"{name}/{file}", 0) for file in (*files_of(record), RECORD_FILE))
    return CardEntry(name, record, seen.kept_share(name), size)


def _hub_base(record: Mapping[str, Any], is_model: Callable[[str], bool]) -> str | None:
    base = record["base"].get("id")
    return base if isinstance(base, str) and is_model(base) else None


def _send(seen: HubRepository, plan: Pushed, private: bool, branch: str | None, message: str | None) -> Pushed:
    api, repo_id = HfApi(), seen.repo_id
    operations: list[Any] = [CommitOperationAdd(path, str(file)) for path, file in plan.files.items()]
    operations += [CommitOperationAdd(CARD_FILE, plan.card.encode())] if plan.card else []
    operations += [CommitOperationDelete(path) for path in plan.removed]
    names = ", ".join(dict.fromkeys(path.split("/")[0] for path in plan.files))
    with hub_errors(repo_id, branch, writing=True):
        if seen.commit is None:
            api.create_repo(repo_id, private=private or None, exist_ok=True)
        if branch and (seen.commit is None or not seen.has_revision):
            api.create_branch(repo_id, branch=branch, exist_ok=True)
        done = api.create_commit(
            repo_id,
            operations,
            commit_message=message or f"Add {names or CARD_FILE}",
            revision=branch,
            parent_commit=seen.commit,
        )
    return replace(plan, commit=done.oid, address=str(done.commit_url))
