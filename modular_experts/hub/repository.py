"""Hub repositories: what a model repository of the Hugging Face hub holds at one commit.

A repository is like a library: an expert in it is a folder with the two files that it has in a library. So one expert
more is one commit more, and what several people pushed can be pulled into one library. Writing is left to
`interop.push`, reading to `interop.pull`.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
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
from modular_experts.library.atomic import is_name
from modular_experts.library.record import DELTA_FILE, RECORD_FILE, STATE_FILE

__all__ = ["HubRepository", "hub_errors", "is_hub_model", "look", "look_before_push", "may_be_hub_model"]


@dataclass(frozen=True)
class HubRepository:
    """A model repository at one commit.

    Attributes:
        repo_id: `owner/name`.
        commit: The commit; none if the repository is not there yet.
        private: Whether only its owner sees it.
        has_revision: Whether the branch that was asked for is there; if not, this is the main one.
        files: Size of each file, by its path.
    """

    repo_id: str
    commit: str | None = None
    private: bool = False
    has_revision: bool = True
    files: Mapping[str, int] = field(default_factory=dict)

    def experts(self) -> list[str]:
        """Return the names of the complete experts."""
        return sorted(name for name, files in self._folders().items() if is_name(name) and not _missing(files))

    def choose(self, wanted: Sequence[str] | None) -> list[str]:
        """Return the names of the experts that are wanted, all if none are named, once each is known to be there.

        Raises:
            ValueError: The repository holds no experts, or not one of these, or only a part of one, or has a file
                whose path leads out of it.
        """
        self._check_paths()
        there = self._folders()
        if not there:
            raise ValueError(f"{self.repo_id} holds no experts: it has no folder with {RECORD_FILE} and {DELTA_FILE}")
        if wanted is not None and not wanted:
            raise ValueError("the list of experts is empty; name at least one, or leave it out for all")
        names = sorted(there) if wanted is None else list(dict.fromkeys(wanted))
        for name in names:
            self._check_expert(check_name(name), there)
        return names

    def _check_expert(self, name: str, there: Mapping[str, set[str]]) -> None:
        if name not in there:
            near = difflib.get_close_matches(name, there, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(there)[:8])}"
            raise ValueError(f"{self.repo_id} has no expert {name!r}; {hint}")
        if missing := _missing(there[name]):
            raise ValueError(f"{name} in {self.repo_id} is not a complete expert: {name}/{missing} is missing")

    def _folders(self) -> dict[str, set[str]]:
        """Return the folders with files of an expert, and which they have."""
        found: dict[str, set[str]] = {}
        for path in self.files:
            folder, _, file = path.rpartition("/")
            if folder and "/" not in folder and file in (RECORD_FILE, DELTA_FILE, STATE_FILE):
                found.setdefault(folder, set()).add(file)
        return found

    def _check_paths(self) -> None:
        for path in self.files:
            if "\\" in path or {"", ".", ".."} & set(path.split("/")):
                raise ValueError(f"{self.repo_id} has a file {path!r}, whose path leads elsewhere; nothing was fetched")

    def fetch(self, files: Sequence[str], directory: Path) -> None:
        """Fetch files of this commit into a directory, under their paths; those that are there are not fetched again.

        Raises:
            OSError: The hub was not reached, or does not give them.
        """
        if files:
            with hub_errors(self.repo_id):
                HfApi().snapshot_download(
                    self.repo_id, revision=self.commit, allow_patterns=list(files), local_dir=directory, tqdm_class=_Bar
                )

    def kept_share(self, name: str) -> float | None:
        """Return the share of entries that an expert keeps, by the header of its file; none if it does not say."""
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


def _missing(files: Collection[str]) -> str | None:
    """Return a file that every expert has and a folder with these files lacks."""
    if RECORD_FILE not in files:
        return RECORD_FILE
    return None if {DELTA_FILE, STATE_FILE} & set(files) else DELTA_FILE


class _Bar(tqdm):
    """A bar on a terminal, nothing in a log."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{"disable": None, **settings})


def look(repo_id: str, revision: str | None = None) -> HubRepository:
    """Return what a repository holds now.

    Args:
        repo_id: `owner/name`.
        revision: Branch, tag or commit; the main branch if none is given.

    Raises:
        ValueError: This is no `owner/name`.
        OSError: The hub was not reached, or has no such repository or revision that one may see.
    """
    _check_repo_id(repo_id)
    with hub_errors(repo_id, revision):
        return _look(repo_id, revision)


def look_before_push(repo_id: str, branch: str | None = None) -> HubRepository:
    """Return what a repository holds that need not be there yet, on a branch that need not be there either."""
    _check_repo_id(repo_id)
    with hub_errors(repo_id, branch, writing=True):
        try:
            return _look(repo_id, branch)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return HubRepository(repo_id)
        except RevisionNotFoundError:
            return _look(repo_id, None, has_revision=False)


def may_be_hub_model(name: str) -> bool:
    """Return whether this can name a model of the hub, and names nothing here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).expanduser().exists()


def is_hub_model(name: str) -> bool:
    """Return whether this names a model that the hub knows, and nothing here.

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


def _look(repo_id: str, revision: str | None, has_revision: bool = True) -> HubRepository:
    api = HfApi()
    info = api.model_info(repo_id, revision=revision)
    tree = api.list_repo_tree(repo_id, recursive=True, revision=info.sha)
    files = {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}
    return HubRepository(repo_id, info.sha, bool(info.private), has_revision, files)


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        pass
    else:
        if "/" in repo_id:
            return
    raise ValueError(f"{repo_id!r} cannot be a repository of the hub; it is written 'owner/name'")


@contextmanager
def hub_errors(repo_id: str, revision: str | None = None, writing: bool = False) -> Iterator[None]:
    """Say in one sentence what the client of the hub raises in a block.

    Args:
        repo_id: The repository that the block asks for.
        revision: Branch, tag or commit that it asks for.
        writing: Whether it writes to the repository, so that being refused is a matter of permission.

    Raises:
        ConnectionError: The hub was not reached, or an answer broke off.
        FileNotFoundError: There is no such repository or revision that one may see.
        PermissionError: One may not do this.
        OSError: The hub answers with another error.
    """
    try:
        yield
    except (OfflineModeIsEnabled, HTTPError, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            raise _answer(error, status, repo_id, revision, writing) from error
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of this machine: a full disk, a directory that may not be written
        raise _no_answer(error, repo_id) from error


def _no_answer(error: Exception, repo_id: str) -> OSError:
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return ConnectionError(f"{repo_id} was not looked up, because HF_HUB_OFFLINE is set; unset it to use the hub")
    if isinstance(error, OSError) and "Consistency check" in str(error):
        return ConnectionError(f"a file of {repo_id} did not arrive whole; nothing was written, so try again")
    return ConnectionError(
        f"the hub was not reached for {repo_id} ({type(error).__name__} at {HfApi().endpoint}); "
        "check the network, or HF_ENDPOINT if you set it"
    )


def _answer(error: Exception, status: int, repo_id: str, revision: str | None, writing: bool) -> OSError:
    """Return the sentence for an answer of the hub that is an error; it says 401 also of what is not there."""
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
    said = " ".join(str(getattr(error, "server_message", None) or "no reason given").split())
    return OSError(f"the hub answered with HTTP {status} for {repo_id}: {said}")
