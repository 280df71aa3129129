"""Compute the hash that tells one base model from another."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

import torch

from modular_experts.base.files import open_tensors, weight_files

__all__ = ["fingerprint"]


def fingerprint(directory: str | Path) -> str:
    """Return the fingerprint of a checkpoint: SHA-256 in 64 hexadecimal digits.

    It covers the name, the shape and the stored bytes of every tensor, and so depends neither on where the files are,
    nor on how they are sharded, nor on the dtype in which the model is loaded. Because hashing a large model takes a
    while, `$XDG_CACHE_HOME/modular-experts` (or `~/.cache/modular-experts`) keeps it for as long as path, size and time
    stamps of the weight files stay the same.

    Raises:
        FileNotFoundError: A weight file is missing.
        ValueError: A weight file is damaged.
    """
    files = weight_files(Path(directory))
    stats = [(str(file.resolve()), file.stat()) for file in files]
    state = [(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino) for path, stat in stats]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "modular-experts" / "fingerprints"
    note = cache / f"{hashlib.sha256(json.dumps(state).encode()).hexdigest()[:32]}.txt"
    with suppress(OSError, UnicodeDecodeError):
        known = note.read_text().strip()
        if len(known) == 64:
            return known
    table = {}
    for file in files:
        with open_tensors(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                tensor = tensors.get_tensor(name)
                content = tensor.reshape(-1).view(torch.uint8).numpy()
                table[name] = [list(tensor.shape), hashlib.sha256(content).hexdigest()]
    found = hashlib.sha256(json.dumps(table, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    with suppress(OSError):  # a cache that cannot be written costs time and nothing else
        note.parent.mkdir(parents=True, exist_ok=True)
        temporary = note.with_suffix(f".{os.getpid()}")
        temporary.write_text(found)
        temporary.replace(note)
    return found
