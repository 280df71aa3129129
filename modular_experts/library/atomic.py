"""Write directories and files whole or not at all, with the umask's permissions."""

import fcntl
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from modular_experts.library.names import check_target
from modular_experts.library.record import RECORD_FILE

# As `_beside` and `tempfile` make them, also with the endings of a file of tensors that was not finished.
_LEFTOVER = re.compile(r"\..+\.[0-9a-z_]{8}(\.data|\.notes)?")


@contextmanager
def new_directory(
    target: Path, overwrite: bool = False, marker: str = RECORD_FILE, key: str | None = None
) -> Iterator[Path]:
    """Yield a temporary directory beside the target, and move it into place when the block ends without an error.

    A reader of the target sees nothing or the whole. With a `key`, which identifies the work, a block that is
    interrupted or killed leaves its files, and the next block with this key finds them. An error removes them.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(target)
    if key:
        temporary = target.with_name(f".{target.name}.{hashlib.sha256(key.encode()).hexdigest()[:16]}")
        # Remove what interrupted work on other contents of this target left, unless another process holds its lock.
        for left in target.parent.glob(f".{target.name}.????????????????"):
            if left != temporary and left.is_dir() and not left.is_symlink():
                with suppress(BlockingIOError), locked(left, target):
                    shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir(exist_ok=key is not None)
    with locked(temporary, target):
        kept = False
        try:
            yield temporary
            shared = temporary.stat().st_mode & 0o666  # mkdir has asked the umask
            for entry in [*temporary.rglob("*"), temporary]:
                if entry.is_file():
                    entry.chmod(shared)
                _flush(entry)
            _move(temporary, check_target(target, overwrite, marker))
        except KeyboardInterrupt as interruption:
            kept = key is not None
            if kept:
                interruption.add_note(f"interrupted; the same command goes on where it stopped, with {temporary}")
            raise
        except OSError as error:
            # A full disk names no file.
            error.filename = error.filename or str(target)
            raise
        finally:
            if not kept:
                shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Yield a temporary place beside a file, and move what is written there into place if the block ends without an
    error; a reader sees the old file or the whole new one.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(target)
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, target)
    except OSError as error:
        error.filename = error.filename or str(target)
        raise
    finally:
        for leftover in target.parent.glob(f"{temporary.name}*"):
            leftover.unlink()


@contextmanager
def locked(directory: Path, target: Path) -> Iterator[None]:
    """Hold a lock on a directory that other processes find by its name; the system frees it when this process ends."""
    if directory.is_symlink():
        raise FileExistsError(f"{directory} is a link, so nothing is written there; remove it")
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise BlockingIOError(
            f"{target} is being written by another process; wait for it, or choose another place"
        ) from None
    finally:
        os.close(handle)


def remove_leftovers(directory: Path) -> None:
    """Remove what killed processes left half-written anywhere in a directory, but for work that goes on by its key.

    The caller knows that no other process is writing single files there.
    """
    for left in list(directory.rglob(".*")):
        if _LEFTOVER.fullmatch(left.name) and not left.is_symlink():
            with suppress(BlockingIOError, FileNotFoundError):
                if left.is_dir():
                    with locked(left, left):
                        shutil.rmtree(left, ignore_errors=True)
                else:
                    left.unlink()


def _move(temporary: Path, target: Path) -> None:
    aside = _beside(target) if target.exists() else None
    if aside:
        os.rename(target, aside)
    try:
        os.rename(temporary, target)
    except OSError:
        if aside:
            os.rename(aside, target)
        raise
    _flush(target.parent)
    if aside:
        shutil.rmtree(aside)


def _beside(target: Path) -> Path:
    # No expert's name begins with a dot, so a leftover of a killed run is never taken for an expert.
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
