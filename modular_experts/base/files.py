"""Fetch, open and hash the files of a checkpoint, and write the small ones. No code from a checkpoint runs."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import torch

from modular_experts.base.auto_class import auto_class
from modular_experts.library.atomic import new_file
from modular_experts.library.record import Facts, Record, package_versions, plain, read_json
from modular_experts.library.tensorfile import file_hash, open_tensors, tensor_bytes

_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*"]
MANIFEST = "modular_experts.json"
"""The file in a checkpoint of ours that records what it was made from; only such a directory is ever replaced."""

_INDEX = "model.safetensors.index.json"
_TOKENIZER = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken"),
    "chat_template*",
)
_COMPANIONS = (*_TOKENIZER, "preprocessor_config.json", "generation_config.json", "LICENSE*")
_WITHOUT_EFFECT = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}
"""Keys of `config.json` that change no output of a model that is loaded in a given dtype."""


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files that make up a checkpoint, after a look at each header."""
    files = [directory / "model.safetensors"]
    if (directory / _INDEX).is_file():
        names = set(read_json(directory / _INDEX, "so the weights cannot be found").get("weight_map", {}).values())
        files = [directory / Path(name).name for name in sorted(names)]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"{directory} has no {file.name}, and only safetensors weights are read; save the model with "
                "transformers' save_pretrained, or fetch the missing file"
            )
        open_tensors(file)  # which checks its header
    return files


def read_layouts(directory: Path) -> dict[Path, dict[str, tuple[str, torch.Size]]]:
    """Return the name, the dtype (as the header spells it) and the shape of each stored tensor, by file."""
    layouts = {}
    for file in weight_files(directory):
        with open_tensors(file) as tensors:
            entries = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118 - not a dict
            layouts[file] = {key: (entry.get_dtype(), torch.Size(entry.get_shape())) for key, entry in entries.items()}
    return layouts


def fingerprint(directory: str | Path, without: str | None = None, rows: Mapping[str, int] | None = None) -> str:
    """Return the SHA-256, in hexadecimal digits, over the name, the shape and the stored bytes of every tensor.

    The tensor that is stored as `without` is left out, and the tensors that are stored by the names in `rows` count
    with this many rows, their first ones.

    `$XDG_CACHE_HOME/modular-experts` (or `~/.cache/modular-experts`) keeps it for as long as path, size and time stamps
    of the weight files stay the same.
    """
    files = weight_files(Path(directory))
    stats = [(str(file.resolve()), file.stat()) for file in files]
    state: list[object] = [
        (path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino) for path, stat in stats
    ]
    state += [option for option in (without, rows) if option]
    note = cache_directory("fingerprints") / f"{hashlib.sha256(json.dumps(state).encode()).hexdigest()[:32]}.txt"
    with suppress(OSError, UnicodeDecodeError):
        known = note.read_text().strip()
        if len(known) == 64:
            return known
    table = {}
    for file in files:
        with open_tensors(file) as tensors:
            for name in {*tensors.keys()} - {without}:
                tensor = tensors.get_tensor(name)
                tensor = tensor[: rows[name]] if rows and name in rows else tensor
                table[name] = [list(tensor.shape), hashlib.sha256(tensor_bytes(tensor)).hexdigest()]
    digest = hashlib.sha256(json.dumps(table, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    with suppress(OSError), new_file(note) as temporary:  # a cache that cannot be written costs time and nothing else
        temporary.write_text(digest)
    return digest


def cache_directory(what: str) -> Path:
    """Return the user's directory of something that can be made again, which may not be there yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "modular-experts" / what


def usage_facts(directory: Path) -> Record:
    """Return what decides how a checkpoint's weights are used: its configuration and its tokenizer's files."""
    config = read_json(directory / "config.json", "so it is not the directory of a model")
    return {
        "config": {key: value for key, value in config.items() if key not in _WITHOUT_EFFECT},
        "tokenizer": {f.name: file_hash(f) for f in _found(directory, _TOKENIZER)},
    }


def _found(directory: Path, patterns: Sequence[str]) -> list[Path]:
    return sorted({file for pattern in patterns for file in directory.glob(pattern) if file.is_file()})


def copy_companions(source: Path, target: Path) -> None:
    """Copy what makes a checkpoint usable: tokenizer, generation settings, licence."""
    for file in _found(source, _COMPANIONS):
        shutil.copyfile(file, target / file.name)


def write_manifest(directory: Path, content: Facts) -> None:
    """Write the record of a checkpoint, with the packages' versions and the time."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    manifest = {**content, "versions": package_versions(), "created": created}
    (directory / MANIFEST).write_text(json.dumps(plain(manifest), indent=2) + "\n", encoding="utf-8")


def fetch(place: str | Path, revision: str | None = None, local_only: bool = False) -> Path:
    """Return the directory of a causal language model, after fetching a hub id that is not in the cache yet.

    With `local_only`, a hub id is looked for in the local cache alone.
    """
    advice = "give the directory of a model (config.json and *.safetensors), or a hub id while the hub is reachable"
    directory = found_or_fetched("base", str(place), revision, _FILES, advice, local_only)
    auto_class(directory)  # which refuses other models
    weight_files(directory)
    return directory


def found_or_fetched(
    what: str, place: str, revision: str | None, patterns: Sequence[str], advice: str, local_only: bool = False
) -> Path:
    """Return the directory at a place, here or on the hub, or raise FileNotFoundError, which calls it `what`."""
    if (directory := Path(place).expanduser()).is_dir():
        return directory
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        fetched = huggingface_hub.snapshot_download(
            place, revision=revision, allow_patterns=list(patterns), local_files_only=local_only
        )
        return Path(fetched)
    except HFValidationError:
        why = "and it is not a hub id, which looks like 'owner/name'"
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "no answer")
        why = f"and the hub does not give it under that id (HTTP {status}; it may be private, gated or misspelt)"
    except OSError:
        offline = "HF_HUB_OFFLINE is set" if huggingface_hub.constants.HF_HUB_OFFLINE else "the hub was not reached"
        why = f"and as a hub id it is not in the local cache ({offline})"
    raise FileNotFoundError(
        f"{what} {place!r} was not found: {directory.absolute()} is not a directory, {why}; {advice}"
    )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and reports; what matters in them is raised as an error."""
    import transformers

    verbosity = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
