"""Look into a model repository of the Hugging Face hub at one commit, and fetch files from it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import tqdm, validate_repo_id

from modular_experts.library import StoredExpert, check_name, open_statistics
from modular_experts.library.record import RECORD_FILE, files_of
from modular_experts.library.state import INPUTS_FILE
from modular_experts.library.statistics import FOLDER, kinds_of_statistics
from modular_experts.text import did_you_mean


@dataclass(frozen=True)
class HubRepository:
    """A model repository at a commit, which is None if it does not exist yet, and the size of each file by its path."""

    repo_id: str
    commit: str | None = None
    private: bool = False
    files: Mapping[str, int] = field(default_factory=dict)

    def folders(self) -> list[str]:
        """Return the names of the folders that hold the record of an expert, also names that no expert may have."""
        folders = (path.removesuffix(f"/{RECORD_FILE}") for path in self.files if path.endswith(f"/{RECORD_FILE}"))
        return sorted(folder for folder in folders if "/" not in folder)

    def choose(self, wanted: Sequence[str] | None) -> list[str]:
        """Return the names of the wanted experts, all if `wanted` is None, once each is known to be there."""
        for path in self.files:
            if "\\" in path or {"", ".", ".."} & set(path.split("/")):
                raise ValueError(f"{self.repo_id} has a file {path!r}, whose path leads elsewhere; nothing was fetched")
        known = self.folders()
        if not known:
            raise ValueError(f"{self.repo_id} holds no experts: it has no folder with {RECORD_FILE}")
        names = known if wanted is None else list(dict.fromkeys(wanted))
        for name in names:
            if check_name(name) not in known:
                hint = did_you_mean(name, known) or f"; it has {', '.join(known[:8])}"
                raise ValueError(f"{self.repo_id} has no expert {name!r}{hint}")
        return names

    def missing(self, name: str, record: Mapping[str, Any]) -> list[str]:
        """Return the paths of the files that an expert's record lists and the repository lacks."""
        return [path for file in files_of(record) if (path := f"{name}/{file}") not in self.files]

    def fetch(self, files: Sequence[str], directory: Path) -> None:
        """Fetch files of this commit into a directory, under their paths; a file that is there stays."""
        if files:
            with hub_errors(self.repo_id):
                HfApi().snapshot_download(
                    self.repo_id, revision=self.commit, allow_patterns=list(files), local_dir=directory, tqdm_class=_Bar
                )


class _Bar(tqdm):
    """A bar on a terminal, nothing in a log."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{"disable": None, **settings})


def look(repo_id: str, revision: str | None = None, writing: bool = False) -> HubRepository:
    """Return what a repository holds now at a revision; if `writing`, it need not exist.

    Raises:
        ValueError: The id is not written `owner/name`.
        OSError: The hub was not reached, or has no such repository or revision that this user may see.
    """
    if not (_is_id(repo_id) and "/" in repo_id):
        raise ValueError(f"{repo_id!r} cannot be a repository of the hub; it is written 'owner/name'")
    api = HfApi()
    with hub_errors(repo_id, revision, writing):
        try:
            info = api.model_info(repo_id, revision=revision)
        except RepositoryNotFoundError:
            if not writing:
                raise
            return HubRepository(repo_id)
        tree = api.list_repo_tree(repo_id, recursive=True, revision=info.sha)
        files = {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}
    return HubRepository(repo_id, info.sha, bool(info.private), files)


def is_hub_model(name: str) -> bool:
    """Return whether a name is the id of a model on the hub and not a path here."""
    if not _is_id(name) or Path(name).expanduser().exists():
        return False
    with hub_errors(name):
        try:
            HfApi().model_info(name)
        except RepositoryNotFoundError:
            return False
    return True


def _is_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def check_contents(expert: StoredExpert, statistics: bool, inputs: bool = False) -> list[str]:
    """Check every byte of an expert, and of its statistics, against its hash; return the files it consists of."""
    expert.verify()
    files = [*files_of(expert.record), RECORD_FILE, *[INPUTS_FILE] * (inputs and expert.keeps_inputs)]
    for kind in kinds_of_statistics(expert) if statistics else ():
        stored = open_statistics(expert, kind)
        for weight in stored:
            stored[weight]  # reading a tensor checks it
        files.append(f"{FOLDER}/{kind}.safetensors")
    return files


@contextmanager
def hub_errors(repo_id: str, revision: str | None = None, writing: bool = False) -> Iterator[None]:
    """Turn what the hub's client raises in a block into an OSError of one sentence."""
    try:
        yield
    except (OfflineModeIsEnabled, HTTPError, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is None and isinstance(error, OSError) and error.errno is not None:
            raise  # an error of this machine: a full disk, a directory that cannot be written
        raise _in_a_sentence(error, status, repo_id, revision, writing) from error


def _in_a_sentence(error: Exception, status: int | None, repo_id: str, revision: str | None, writing: bool) -> OSError:
    login = "log in with 'hf auth login'"
    if status is None:
        which = f"{repo_id} ({type(error).__name__} at {HfApi().endpoint})"
        advice = "check the network, and HF_ENDPOINT and HF_HUB_OFFLINE if you set them"
        return ConnectionError(f"the hub was not reached for {which}; {advice}")
    if isinstance(error, RevisionNotFoundError):
        return FileNotFoundError(f"{repo_id} has no branch, tag or commit {revision!r}")
    if writing and status in (401, 403):
        return PermissionError(f"the hub does not let you write to {repo_id} (HTTP {status}); {login}")
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403, 404):  # 401 also for one that does not exist
        which = f"model repository {repo_id} that you may see (HTTP {status})"
        return FileNotFoundError(f"the hub has no {which}; check its name, or {login} if it is private")
    if writing and status in (409, 412):
        return FileExistsError(f"{repo_id} was changed by someone else at the same time (HTTP {status}); push again")
    reason = " ".join(str(getattr(error, "server_message", None) or "no reason given").split())
    return OSError(f"the hub answered with HTTP {status} for {repo_id}: {reason}")
