"""Push experts and a card about them into a repository of the hub, in one commit, after reading and checking them."""

import json
import logging
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from modular_experts.library import StoredExpert, open_experts
from modular_experts.library.card import CARD_FILE, CardEntry, is_ours, model_card
from modular_experts.library.compatibility import open_parents
from modular_experts.library.hub import HubRepository, check_contents, find_repository, hub_errors, is_hub_model
from modular_experts.library.kept_inputs import INPUTS_FILE
from modular_experts.library.names import is_name
from modular_experts.library.record import DELTA_FILE, RECORD_FILE, ROUTED, STATE_FILE, files_of, read_record
from modular_experts.library.signing import SIGNATURE_FILE, signature_of
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
        return {path: file.stat().st_size if isinstance(file, Path) else len(file) for path, file in self.files.items()}

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
    license: str | None = None,
    sign: str | Path | None = None,
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
        license: The experts' licence, as the hub names it: `apache-2.0`, `mit`, `other`. By default each has the
            licence of its record, as a pulled expert has one, which stays, or the one that all of its parents have.
        sign: A private key on an elliptic curve (PEM). Each expert gets a signature, `model.sig`.

    Raises:
        ValueError: An expert is damaged, the list is empty, two experts have the same name, a route in the repository
            chooses among experts that this push replaces, or an expert has no licence, or parents with different ones.
        OSError: The hub was not reached, does not let this user write, or has another expert of that name.
    """
    opened = _open(experts)
    licenses = {name: _license_of(expert, license) for name, expert in opened.items()}
    files: dict[str, Path | bytes] = {}
    for name in progress(list(opened)):
        contents = check_contents(opened[name], statistics, inputs)
        files |= {f"{name}/{file}": opened[name].path / file for file in contents}
        files[f"{name}/{RECORD_FILE}"] = _published(opened[name], licenses[name])
        if sign is not None:
            own = [RECORD_FILE, *files_of(opened[name].record)]
            files[f"{name}/{SIGNATURE_FILE}"] = signature_of({file: files[f"{name}/{file}"] for file in own}, sign)
    reached = True
    try:
        repository = find_repository(repo_id, writing=True)
    except ConnectionError as error:
        if not dry_run:
            raise
        log.warning("%s; this dry run shows what a push into an empty repository would write", error)
        repository = HubRepository(repo_id)
        reached = False
    if private and repository.commit and not repository.private:
        raise PermissionError(f"{repo_id} is public; make it private on its page first, or leave out private")
    there, entries, earlier = _look_inside(repository, opened)
    # The record holds the hash of the contents.
    present = [name for name in opened if there.get(name) == files[f"{name}/{RECORD_FILE}"]]
    replaced = [name for name in opened if name in there and name not in present]
    if replaced and not overwrite:
        raise FileExistsError(
            f"{repo_id} has another expert called {replaced[0]}; give yours another name, or replace it with "
            "`overwrite=True`"
        )
    _check_routes(repository, entries, [opened[name] for name in replaced])
    new = {path: file for path, file in files.items() if _is_extra(path) or path.split("/")[0] not in present}
    removed = []
    for path in repository.files:
        name, _, file = path.partition("/")
        is_old = name in opened and name not in present and file in (DELTA_FILE, STATE_FILE)
        if (is_old or (name in replaced and _is_extra(path))) and path not in new:
            removed.append(path)
    kept = files.keys() | (repository.files.keys() - {*removed})
    for expert in opened.values():
        has_inputs = f"{expert.name}/{INPUTS_FILE}" in kept
        record = {**expert.record, "license": licenses[expert.name]}
        entries.append(CardEntry(expert.name, record, expert.size_on_disk, inputs=has_inputs))
    if reached:
        entries = _with_hub_bases(entries)
    card = model_card(repo_id, entries, earlier) if is_ours(earlier) else None
    plan = Pushed(new, removed, present, card, f"{HfApi().endpoint}/{repo_id}")
    if dry_run or not (new or removed or card not in (None, earlier)):
        return plan
    return _commit(repository, plan, private)


def _with_hub_bases(entries: Sequence[CardEntry]) -> list[CardEntry]:
    """Return the entries of a card with their base where the hub has it."""
    on_hub = cache(is_hub_model)
    known = []
    for entry in entries:
        base = str(entry.record["base"].get("id"))
        known.append(replace(entry, hub_base=base if on_hub(base) else None))
    return known


def _is_extra(path: str) -> bool:
    """Return whether a path is of statistics, inputs or a signature, which go even if the repository has the expert."""
    _, _, file = path.partition("/")
    return file in (INPUTS_FILE, SIGNATURE_FILE) or file.startswith(f"{FOLDER}/")


def _look_inside(
    repository: HubRepository, opened: Mapping[str, StoredExpert]
) -> tuple[dict[str, bytes], list[CardEntry], str]:
    """Return the records in a repository by the name of their expert, the card's entries of experts that are not
    pushed, and the card's text.
    """
    there: dict[str, bytes] = {}
    entries = []
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        names = [name for name in repository.folders() if is_name(name)]
        cards = [CARD_FILE] if CARD_FILE in repository.files else []
        repository.fetch([*cards, *(f"{name}/{RECORD_FILE}" for name in names)], place)
        for name in names:
            file = place / name / RECORD_FILE
            there[name] = file.read_bytes()
            if name not in opened:
                entries.append(_entry(repository, name, file))
        earlier = "".join((place / name).read_text(encoding="utf-8", errors="replace") for name in cards)
    return there, entries, earlier


def _check_routes(repository: HubRepository, entries: Sequence[CardEntry], experts: Sequence[StoredExpert]) -> None:
    """Raise ValueError if routes that stay in a repository were made with other experts than those in their place."""
    for expert in experts:
        for entry in entries:
            parents = [parent for parent in entry.record["parents"] if parent["name"] == expert.name]
            if entry.record["kind"] == ROUTED and parents and not expert.is_listed_as(parents[0]):
                raise ValueError(
                    f"{repository.repo_id} has the route {entry.name}, which was made with another {expert.name} and "
                    "would no longer open; push a route of the new expert with it, remove the route there first, or "
                    "give your expert another name"
                )


def _license_of(expert: StoredExpert, given: str | None) -> str:
    """Return the licence that is given, or the one in the record, or the one that all parents have."""
    if given is not None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", given):
            raise ValueError(f"license={given!r} is not as the hub names licences, such as apache-2.0, mit or other")
        if expert.record.get("license") not in (None, given):
            raise ValueError(
                f"{expert.name} came under {expert.record['license']} by its record, and license={given!r} is given; "
                "leave license out for it"
            )
        return given
    own = expert.record.get("license")
    by_parent = {parent["name"]: parent.get("license") for parent in expert.record["parents"]}
    different = {str(of) for of in by_parent.values() if of}
    if own:
        return str(own)
    if len(different) > 1:
        shown = ", ".join(f"{name} ({of})" for name, of in by_parent.items() if of)
        raise ValueError(
            f"{expert.name} is made of experts with different licences: {shown}; name one that they all allow, such as "
            "license='other'"
        )
    if different and all(by_parent.values()):
        return different.pop()
    raise ValueError(f"{expert.name} has no licence, so nobody may use it; name one, such as license='apache-2.0'")


def _published(expert: StoredExpert, license: str) -> bytes:
    """Return the record of an expert with its licence, and the last part of absolute paths of base and source."""
    content = (expert.path / RECORD_FILE).read_bytes()
    record = json.loads(content)
    origins = [record["base"], record.get("source") or {}]
    absolute = [origin for origin in origins if Path(str(origin.get("id"))).is_absolute()]
    if not absolute and record.get("license") == license:
        return content
    for origin in absolute:
        origin["id"] = Path(origin["id"]).name
    return (json.dumps(record | {"license": license}, indent=2) + "\n").encode()


def _open(experts: Sequence[str | Path]) -> dict[str, StoredExpert]:
    """Return experts by name, and those behind routers among them, which are of no use without these."""
    named = open_experts(experts, mergeable=False)
    opened = dict[str, StoredExpert]()
    behind = [parent for expert in named if expert.is_routed for parent in open_parents(expert)]
    for expert in [*named, *behind]:
        if expert.path != opened.setdefault(expert.name, expert).path:
            raise ValueError(f"two of the experts are called {expert.name}, and names must differ; push one of them")
    return opened


def _entry(repository: HubRepository, name: str, file: Path) -> CardEntry:
    try:
        record = read_record(file)
    except ValueError as error:
        shown = str(error).replace(str(file.parents[1]), repository.repo_id)
        raise ValueError(f"{shown}; remove it there first") from error
    size = sum(repository.files.get(f"{name}/{part}", 0) for part in (*files_of(record), RECORD_FILE))
    return CardEntry(name, record, size, inputs=f"{name}/{INPUTS_FILE}" in repository.files)


def _commit(repository: HubRepository, plan: Pushed, private: bool) -> Pushed:
    api = HfApi()
    repo_id = repository.repo_id
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(path, str(file) if isinstance(file, Path) else file) for path, file in plan.files.items()
    ]
    if plan.card:
        operations.append(CommitOperationAdd(CARD_FILE, plan.card.encode()))
    operations += [CommitOperationDelete(path) for path in plan.removed]
    names = ", ".join(dict.fromkeys(path.split("/")[0] for path in plan.files))
    with hub_errors(repo_id, writing=True):
        if repository.commit is None:
            api.create_repo(repo_id, private=private or None, exist_ok=True)
        done = api.create_commit(
            repo_id, operations, commit_message=f"Add {names or CARD_FILE}", parent_commit=repository.commit
        )
    return replace(plan, commit=done.oid, address=str(done.commit_url))
