"""Hub errors: what the client of the Hugging Face hub raises, as one sentence that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import huggingface_hub
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

__all__ = ["hub_errors"]


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
