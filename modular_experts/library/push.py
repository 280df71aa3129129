"""Push experts and a card about them into a repository of the hub, in one commit, after reading and checking them."""

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from modular_experts.library import StoredExpert, open_experts
from modular_experts.library.atomic import is_name
from modular_experts.library.card import CARD_FILE, CardEntry, is_ours, model_card
from modular_experts.library.compatibility import open_parents
from modular_experts.library.hub import HubRepository, check_contents, hub_errors, is_hub_model, look
from modular_experts.library.record import DELTA_FILE, RECORD_FILE, STATE_FILE, files_of, read_record
from modular_experts.library.state import INPUTS_FILE
from modular_experts.library.statistics import FOLDER
from modular_experts.progress import Progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pushed:
    """What a push wrote, or would write: files beside the card by path, and those that it `removed`.

    `card` is None if the repository has one of its own, `commit` after a dry run or if there was nothing to write.
    """

    files: Mapping[str, Path | bytes]
    removed: Sequence[str]
    present: Sequence[str]
    card: str | None
    address: str
    commit: str | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """The bytes of each file."""
        return {path: one.stat().st_size if isinstance(one, Path) else len(one) for path, one in self.files.items()}

    @property
    def experts(self) -> list[str]:
        return sorted({path.split("/")[0] for path in self.files} - set(self.present))


def push(
    experts: Sequence[str | Path],
    repo_id: str,
    private: bool = False,
    overwrite: bool = False,
    statistics: bool = False,
    dry_run: bool = False,
    inputs: bool = False,
    progress: Progress = iter,
) -> Pushed:
    """Write experts and a card into a repository of the hub.

    Args:
        experts: Directories of experts. The experts behind a router go with it.
        repo_id: `owner/name`; made if it does not exist.
        private: Make the repository private; one that exists must be.
        overwrite: Replace experts of the same name.
        statistics: Push the experts' statistics too.
        dry_run: Check everything and write nothing; without the network, as for an empty repository.
        inputs: Push the inputs that experts keep too, which their tokenizer turns back into text.

    Raises:
        ValueError: An expert is damaged, the list is empty, or two experts have the same name.
        OSError: The hub was not reached, does not let this user write, or has another expert of that name.
    """
    opened = _open(experts)
    files: dict[str, Path | bytes] = {}
    for name in progress(list(opened)):
        contents = check_contents(opened[name], statistics, inputs)
        files |= {f"{name}/{file}": opened[name].path / file for file in contents}
        files[f"{name}/{RECORD_FILE}"] = _published(opened[name])
    try:
        repository, reached = look(repo_id, writing=True), True
    except ConnectionError as error:
        if not dry_run:
            raise
        log.warning("%s; this dry run shows what a push into an empty repository would write", error)
        repository, reached = HubRepository(repo_id), False
    if private and repository.commit and not repository.private:
        raise PermissionError(f"{repo_id} is public; make it private on its page first, or leave out private")
    present, entries, earlier = _look_inside(repository, opened, overwrite)
    # Statistics (`<expert>/statistics/<kind>`) and inputs go even if the repository has their expert already.
    new = {
        path: file
        for path, file in files.items()
        if path.count("/") > 1 or path.endswith(f"/{INPUTS_FILE}") or path.split("/")[0] not in present
    }
    removed = [
        path
        for path in repository.files
        if path.split("/")[0] in opened.keys() - set(present)
        and path.split("/")[1:2] in ([FOLDER], [DELTA_FILE], [STATE_FILE], [INPUTS_FILE])
        and path not in new
    ]
    kept = files.keys() | (repository.files.keys() - {*removed})
    entries += [
        CardEntry(one.name, one.record, one.size_on_disk, inputs=f"{one.name}/{INPUTS_FILE}" in kept)
        for one in opened.values()
    ]
    on_hub = cache(lambda base: reached and isinstance(base, str) and is_hub_model(base))
    bases = [entry.record["base"].get("id") for entry in entries]
    entries = [replace(e, hub_base=base if on_hub(base) else None) for e, base in zip(entries, bases, strict=True)]
    card = model_card(repo_id, entries, earlier) if is_ours(earlier) else None
    plan = Pushed(new, removed, present, card, f"{HfApi().endpoint}/{repo_id}")
    if dry_run or not (new or removed or card not in (None, earlier)):
        return plan
    return _commit(repository, plan, private)


def _look_inside(
    repository: HubRepository, opened: Mapping[str, StoredExpert], overwrite: bool
) -> tuple[list[str], list[CardEntry], str]:
    present, entries = [], []
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        cards = [CARD_FILE] if CARD_FILE in repository.files else []
        theirs = [name for name in repository.folders() if is_name(name)]
        repository.fetch([*cards, *(f"{name}/{RECORD_FILE}" for name in theirs)], place)
        for name in theirs:
            record = place / name / RECORD_FILE
            if name not in opened:
                entries += _entry(repository, name, record)
            elif record.read_bytes() == _published(opened[name]):
                present.append(name)  # the record holds the hash of the contents
            elif not overwrite:
                raise FileExistsError(
                    f"{repository.repo_id} has another expert called {name}; give yours another name, or replace it "
                    "with `overwrite=True`"
                )
        earlier = "".join((place / name).read_text(encoding="utf-8", errors="replace") for name in cards)
    return present, entries, earlier


def _published(expert: StoredExpert) -> bytes:
    """Return the record of an expert, in which absolute paths of base and source give way to the directory's name."""
    content = (expert.path / RECORD_FILE).read_bytes()
    record = json.loads(content)
    named = [one for one in (record["base"], record.get("source")) if one and Path(str(one.get("id"))).is_absolute()]
    for one in named:
        one["id"] = Path(one["id"]).name
    return (json.dumps(record, indent=2) + "\n").encode() if named else content


def _open(experts: Sequence[str | Path]) -> dict[str, StoredExpert]:
    named, opened = open_experts(experts, mergeable=False), dict[str, StoredExpert]()
    # A router is of no use without the experts behind it.
    behind = [one for expert in named if expert.is_routed for one in open_parents(expert)]
    for expert in [*named, *(one for one in behind if all(one.path != expert.path for expert in named))]:
        if expert.name in opened and expert.path != opened[expert.name].path:
            raise ValueError(f"two of the experts are called {expert.name}, and names must differ; push one of them")
        opened[expert.name] = expert
    return opened


def _entry(repository: HubRepository, name: str, file: Path) -> list[CardEntry]:
    try:
        record = read_record(file)
    except ValueError as error:
        shown = str(error).replace(str(file.parents[1]), repository.repo_id)
        raise ValueError(f"{shown}; remove it there first") from error
    if repository.missing(name, record):
        return []
    size = sum(repository.files[f"{name}/{part}"] for part in (*files_of(record), RECORD_FILE))
    return [CardEntry(name, record, size, inputs=f"{name}/{INPUTS_FILE}" in repository.files)]


def _commit(repository: HubRepository, plan: Pushed, private: bool) -> Pushed:
    api, repo_id = HfApi(), repository.repo_id
    operations: list[Any] = [
        CommitOperationAdd(path, str(file) if isinstance(file, Path) else file) for path, file in plan.files.items()
    ]
    operations += [CommitOperationAdd(CARD_FILE, plan.card.encode())] if plan.card else []
    operations += [CommitOperationDelete(path) for path in plan.removed]
    names = ", ".join(dict.fromkeys(path.split("/")[0] for path in plan.files))
    with hub_errors(repo_id, writing=True):
        if repository.commit is None:
            api.create_repo(repo_id, private=private or None, exist_ok=True)
        subject, head = f"Add {names or CARD_FILE}", repository.commit
        done = api.create_commit(repo_id, operations, commit_message=subject, parent_commit=head)
    return replace(plan, commit=done.oid, address=str(done.commit_url))
