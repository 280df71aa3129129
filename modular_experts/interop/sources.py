"""Sources: where other people's fine-tuning lies, and which format its files show.

The three formats are told apart by one file each; what is in them is read elsewhere.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from modular_experts.interop.composable_sft import DIFF_FILE
from modular_experts.interop.spiel import CONFIG_FILE
from modular_experts.interop.weights import read_json, weight_files

__all__ = ["Source", "find_source"]

_FETCHED = ["*.json", "*.safetensors", "adapter_model.bin", DIFF_FILE]
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Source:
    """A directory with a fine-tuning.

    Attributes:
        place: How it was named: a directory or a hub id.
        directory: Where its files are.
        revision: Branch, tag or commit of a hub id.
    """

    place: str
    directory: Path
    revision: str | None = None

    @property
    def is_adapter(self) -> bool:
        """Whether it has the configuration of a PEFT adapter."""
        return (self.directory / CONFIG_FILE).is_file()

    @property
    def is_sparse_file(self) -> bool:
        """Whether it has the one file of composable-sft."""
        return not self.is_adapter and (self.directory / DIFF_FILE).is_file()

    @property
    def is_checkpoint(self) -> bool:
        """Whether it is neither, and the directory of a model."""
        return not (self.is_adapter or self.is_sparse_file) and (self.directory / "config.json").is_file()

    @property
    def format(self) -> str:
        """What it is, in words."""
        if self.is_checkpoint:
            return "full checkpoint"
        return "composable-sft" if self.is_sparse_file else "PEFT adapter"

    def base(self) -> tuple[str | None, str | None]:
        """Return the base that an adapter's configuration names, and its revision."""
        config = read_json(self.directory / CONFIG_FILE, "so no base is named") if self.is_adapter else {}
        return config.get("base_model_name_or_path") or None, config.get("revision") or None

    def hashes(self) -> dict[str, str]:
        """Return the SHA-256 of each file that the numbers come from, and of the adapter's configuration."""
        files = [self.directory / name for name in (CONFIG_FILE, *_ADAPTER_FILES)] if self.is_adapter else []
        files += [self.directory / DIFF_FILE] if self.is_sparse_file else []
        files += weight_files(self.directory) if self.is_checkpoint else []
        return {file.name: _sha256(file) for file in files if file.is_file()}


def find_source(place: str | Path, revision: str | None = None) -> Source:
    """Return where a fine-tuning lies, after fetching it if it is a hub id that is not in the cache yet.

    Raises:
        FileNotFoundError: There is no such directory, and the hub does not give it.
        ValueError: Its files are of no known format; the sentence lists what was looked for.
    """
    directory = Path(place).expanduser()
    if directory.is_file():
        raise ValueError(f"{place} is a file; give the directory that it lies in, with the files beside it")
    source = Source(str(place), directory if directory.is_dir() else _from_hub(str(place), revision), revision)
    if not (source.is_adapter or source.is_sparse_file or source.is_checkpoint):
        raise ValueError(
            f"{place} holds no fine-tuning of a known format: looked for {CONFIG_FILE} (a PEFT adapter), {DIFF_FILE} "
            f"(composable-sft) and config.json with *.safetensors (a full checkpoint); it has "
            f"{_listing(source.directory)}"
        )
    return source


def _from_hub(place: str, revision: str | None) -> Path:
    try:
        return Path(snapshot_download(place, revision=revision, allow_patterns=_FETCHED))
    except HFValidationError:
        why = "and it is no hub id, which looks like 'owner/name'"
    except OSError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        offline = "HF_HUB_OFFLINE is set" if huggingface_hub.constants.HF_HUB_OFFLINE else "the hub was not reached"
        told = f"HTTP {status}; it may be private, gated or misspelt" if status else f"{offline}, no copy in the cache"
        why = f"and the hub does not give it under that id ({told})"
    raise FileNotFoundError(
        f"source {place!r} was not found: {Path(place).expanduser().absolute()} is no directory, {why}"
    )


def _listing(directory: Path) -> str:
    names = sorted(path.name for path in directory.iterdir())
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more if names else "no files"


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
