"""Look into a model repository of the Hugging Face hub at one commit, and fetch files from it.

A repository is like a library: each expert in it is a folder with the files that it has in a library. So several people
can push experts into one repository, one commit each, and pull all of them into one library.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import tqdm, validate_repo_id

from modular_experts.library import check_name
from modular_experts.library.record import DELTA_FILE, RECORD_FILE, files_of
from modular_experts.text import did_you_mean

__all__ = ["HubRepository", "hub_errors", "is_hub_model", "look", "may_be_hub_model"]


@dataclass(frozen=True)
class HubRepository:
    """A model repository at one commit.

    Attributes:
        repo_id: `owner/name`.
        commit: The commit; None for a repository that does not exist yet.
        private: Whether only its owner sees it.
        has_revision: Whether the requested branch exists; if not, this is the main branch.
        files: Size of each file in bytes, by its path.
    """

    repo_id: str
    commit: str | None = None
    private: bool = False
    has_revision: bool = True
    files: Mapping[str, int] = field(default_factory=dict)

    def folders(self) -> list[str]:
        """Return the names of the folders that hold the record of an expert, also names that no expert may have."""
        folders = (path.removesuffix(f"/{RECORD_FILE}") for path in self.files if path.endswith(f"/{RECORD_FILE}"))
        return sorted(folder for folder in folders if "/" not in folder)

    def choose(self, wanted: Sequence[str] | None) -> list[str]:
        """Return the names of the wanted experts, all if `wanted` is None, once each is known to be there.

        Raises:
            ValueError: The repository holds no experts, lacks one that is wanted, or has a file whose path leads out
                of it.
        """
        for path in self.files:
            if "\\" in path or {"", ".", ".."} & set(path.split("/")):
                raise ValueError(f"{self.repo_id} has a file {path!r}, whose path leads elsewhere; nothing was fetched")
        known = self.folders()
        if not known:
            raise ValueError(f"{self.repo_id} holds no experts: it has no folder with {RECORD_FILE}")
        if wanted is not None and not wanted:
            raise ValueError("the list of experts is empty; name at least one, or leave it out for all")
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
        """Fetch files of this commit into a directory, under their paths; a file that is there stays.

        Raises:
            OSError: The hub was not reached, or does not give them.
        """
        if files:
            with hub_errors(self.repo_id):
                HfApi().snapshot_download(
                    self.repo_id, revision=self.commit, allow_patterns=list(files), local_dir=directory, tqdm_class=_Bar
                )

    def kept_share(self, name: str) -> float | None:
        """Return the share of entries that an expert keeps, from the header of its file; None if that has none."""
        with hub_errors(self.repo_id):
            try:
                header = HfApi().parse_safetensors_file_metadata(
                    self.repo_id, f"{name}/{DELTA_FILE}", revision=self.commit
                )
                weights = json.loads(header.metadata["modular_experts"])["weights"].values()
                total = sum(math.prod(entry["shape"]) for entry in weights)
                return sum(entry["kept"] for entry in weights) / total
            except (SafetensorsParsingError, json.JSONDecodeError, LookupError, TypeError, ArithmeticError):
                return None


class _Bar(tqdm):
    """A bar on a terminal, nothing in a log."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{"disable": None, **settings})


def look(repo_id: str, revision: str | None = None, writing: bool = False) -> HubRepository:
    """Return what a repository holds now.

    Args:
        repo_id: `owner/name`.
        revision: Branch, tag or commit; the main branch if not given.
        writing: Whether to accept a repository that does not exist yet, and a branch that does not exist yet.

    Raises:
        ValueError: The id is not written `owner/name`.
        OSError: The hub was not reached, or has no such repository or revision that this user may see.
    """
    try:
        validate_repo_id(repo_id)
        valid = "/" in repo_id
    except HFValidationError:
        valid = False
    if not valid:
        raise ValueError(f"{repo_id!r} cannot be a repository of the hub; it is written 'owner/name'")
    api, has_revision = HfApi(), True
    with hub_errors(repo_id, revision, writing):
        try:
            info = api.model_info(repo_id, revision=revision)
        except GatedRepoError:  # also a RepositoryNotFoundError
            raise
        except RepositoryNotFoundError:
            if not writing:
                raise
            return HubRepository(repo_id)
        except RevisionNotFoundError:
            if not writing:
                raise
            info, has_revision = api.model_info(repo_id), False
        tree = api.list_repo_tree(repo_id, recursive=True, revision=info.sha)
        files = {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}
    return HubRepository(repo_id, info.sha, bool(info.private), has_revision, files)


def may_be_hub_model(name: str) -> bool:
    """Return whether a name is a valid id of a hub model and not a path on this machine."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).expanduser().exists()


def is_hub_model(name: str) -> bool:
    """Return whether a name is the id of a model on the hub and not a path on this machine.

    Raises:
        OSError: The hub was not reached.
    """
    if not may_be_hub_model(name):
        return False
    with hub_errors(name):
        try:
            HfApi().model_info(name)
        except RepositoryNotFoundError:
            return False
    return True


@contextmanager
def hub_errors(repo_id: str, revision: str | None = None, writing: bool = False) -> Iterator[None]:
    """Turn what the hub's client raises in a block into an error of one sentence.

    Args:
        repo_id: The repository that the block asks for.
        revision: Branch, tag or commit that it asks for.
        writing: Whether it writes to the repository, so that a refusal is a matter of permission.

    Raises:
        ConnectionError: The hub was not reached, or an answer broke off.
        FileNotFoundError: There is no such repository or revision that this user may see.
        PermissionError: This user may not do this.
        OSError: The hub answers with another error.
    """
    try:
        yield
    except (OfflineModeIsEnabled, HTTPError, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is None and isinstance(error, OSError) and error.errno is not None:
            raise  # an error of this machine: a full disk, a directory that cannot be written
        if status is None:
            raise ConnectionError(_no_answer(error, repo_id)) from error
        raise _refusal(error, status, repo_id, revision, writing) from error


def _no_answer(error: Exception, repo_id: str) -> str:
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return f"{repo_id} was not looked up, because HF_HUB_OFFLINE is set; unset it to use the hub"
    if "Consistency check" in str(error):
        return f"a file of {repo_id} did not arrive whole; nothing was written, so try again"
    return (
        f"the hub was not reached for {repo_id} ({type(error).__name__} at {HfApi().endpoint}); "
        "check the network, or HF_ENDPOINT if you set it"
    )


def _refusal(error: Exception, status: int, repo_id: str, revision: str | None, writing: bool) -> OSError:
    """Return the error for an answer of the hub, which gives 401 also for a repository that does not exist."""
    if isinstance(error, GatedRepoError):
        return PermissionError(f"{repo_id} is gated; ask for access on its page, and log in with 'hf auth login'")
    if isinstance(error, RevisionNotFoundError):
        return FileNotFoundError(f"{repo_id} has no branch, tag or commit {revision!r}")
    if writing and status in (401, 403):
        return PermissionError(
            f"the hub does not let you write to {repo_id} (HTTP {status}); log in with 'hf auth login', or set "
            "HF_TOKEN, with a token that may write there"
        )
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403, 404):
        return FileNotFoundError(
            f"the hub has no model repository {repo_id} that you may see (HTTP {status}); check its name, or log in "
            "with 'hf auth login' if it is private"
        )
    if writing and status in (409, 412):
        return FileExistsError(f"{repo_id} was changed by someone else at the same time (HTTP {status}); push again")
    reason = " ".join(str(getattr(error, "server_message", None) or "no reason given").split())
    return OSError(f"the hub answered with HTTP {status} for {repo_id}: {reason}")
