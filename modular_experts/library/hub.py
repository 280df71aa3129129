"""Look into a model repository of the Hugging Face hub at one commit, and fetch files from it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import tqdm

from modular_experts.library import StoredExpert, check_name, open_statistics
from modular_experts.library.kept_inputs import INPUTS_FILE
from modular_experts.library.record import RECORD_FILE, files_of
from modular_experts.library.statistics import FOLDER, kinds_of_statistics
from modular_experts.places import may_be_on_hub
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
        known = self.folders()
        if not known:
            raise ValueError(f"{self.repo_id} holds no experts: it has no folder with {RECORD_FILE}")
        names = known if wanted is None else list(dict.fromkeys(wanted))
        for name in names:
            if check_name(name) not in known:
                hint = did_you_mean(name, known) or f"; it has {', '.join(known[:8])}"
                raise ValueError(f"{self.repo_id} has no expert {name!r}{hint}")
        return names

    def fetch(self, files: Sequence[str], directory: Path) -> None:
        """Fetch these files of this commit and no others into a directory, under their paths; what is there stays."""
        if files:
            with hub_errors(self.repo_id):
                HfApi().snapshot_download(
                    self.repo_id, revision=self.commit, allow_patterns=list(files), local_dir=directory, tqdm_class=_Bar
                )


class _Bar(tqdm):
    """A bar on a terminal, nothing in a log."""

    def __init__(self, *args: object, **settings: object) -> None:
        super().__init__(*args, **{"disable": None, **settings})


def find_repository(repo_id: str, revision: str | None = None, writing: bool = False) -> HubRepository:
    """Return what a repository holds now at a revision; if `writing`, it need not exist.

    Raises:
        ValueError: The id is not written `owner/name`.
        OSError: The hub was not reached, or has no such repository or revision that this user may see.
    """
    if repo_id.count("/") != 1:
        raise ValueError(f"{repo_id!r} cannot be a repository of the hub; it is written 'owner/name'")
    with hub_errors(repo_id, revision, writing):
        try:
            info = HfApi().model_info(repo_id, revision=revision, files_metadata=True)
        except RepositoryNotFoundError:
            if not writing:
                raise
            return HubRepository(repo_id)
    files = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    return HubRepository(repo_id, info.sha, bool(info.private), files)


def is_hub_model(name: str) -> bool:
    """Return whether a name is the id of a model on the hub and not a path here."""
    with hub_errors(name):
        return may_be_on_hub(name) and HfApi().repo_exists(name)


def check_contents(expert: StoredExpert, statistics: bool, inputs: bool = False) -> list[str]:
    """Check every byte of an expert, and of its statistics, against its hash; return the files it consists of."""
    expert.verify()
    files = [*files_of(expert.record), RECORD_FILE]
    if inputs and expert.keeps_inputs:
        files.append(INPUTS_FILE)
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
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{repo_id} has no branch, tag or commit {revision!r}") from error
    except (OfflineModeIsEnabled, HTTPError, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403, 404):  # the hub answers 401 also about a repository that does not exist
            allowed = "write to" if writing else "see"
            raise FileNotFoundError(
                f"the hub has no model repository {repo_id} that you may {allowed} (HTTP {status}); check its name, or "
                "log in with 'hf auth login'"
            ) from error
        if status in (409, 412) and writing:
            raise FileExistsError(
                f"{repo_id} was changed by someone else at the same time (HTTP {status}); push again"
            ) from error
        if status is not None:
            reason = getattr(error, "server_message", None) or "no reason given"
            raise OSError(f"the hub answered with HTTP {status} for {repo_id}: {' '.join(reason.split())}") from error
        if isinstance(error, OSError) and error.errno is not None:
            raise  # an error of this machine: a full disk, a directory that cannot be written
        raise ConnectionError(
            f"the hub was not reached for {repo_id} ({type(error).__name__} at {HfApi().endpoint}); check the network, "
            "and HF_ENDPOINT and HF_HUB_OFFLINE if you set them"
        ) from error
