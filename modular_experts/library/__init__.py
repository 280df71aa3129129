"""Keep experts in a directory, the library: each is written whole or not at all, and checked at every read.

Open `expert.py` first, which reads and writes one expert; `opening.py` finds it. No model is loaded here, and nothing
is merged.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from modular_experts.library.atomic import new_directory
from modular_experts.library.compatibility import (
    as_parents,
    check_fingerprint,
    common_base,
    open_experts,
    parent_ids,
    training_in_common,
    union_of_weights,
    warn_of_missing_parents,
    warn_unlike_training,
)
from modular_experts.library.expert import DELTA_FILE, RECORD_FILE, STATE_FILE, StoredExpert, write_expert
from modular_experts.library.names import check_name, check_target, is_name
from modular_experts.library.opening import is_adapter, open_expert
from modular_experts.library.record import make_record
from modular_experts.library.statistics import gather_statistics, open_statistics, write_statistics
from modular_experts.text import did_you_mean

__all__ = ["Library", "StoredExpert", "as_parents", "check_fingerprint", "check_name", "check_target", "common_base"]
__all__ += ["gather_statistics", "is_adapter", "make_record", "new_directory", "open_expert", "open_experts"]
__all__ += ["open_statistics", "parent_ids", "training_in_common", "union_of_weights", "warn_of_missing_parents"]
__all__ += ["warn_unlike_training", "write_expert", "write_statistics"]


log = logging.getLogger(__name__)


class Library(Mapping[str, StoredExpert]):
    """The complete experts in a directory, by name, PEFT adapters among them.

    Args:
        directory: The directory.
        base: The base of the adapters, as for `open_expert`.
    """

    def __init__(self, directory: str | Path, base: object = None) -> None:
        self._base = base
        self.directory = Path(os.path.abspath(Path(directory).expanduser()))
        if not self.directory.is_dir():
            raise FileNotFoundError(f"{directory} is not a library: there is no such directory")
        if (self.directory / RECORD_FILE).is_file():
            raise ValueError(f"{directory} is an expert, not a library; its library is {Path(directory).parent}")

    def __getitem__(self, name: str) -> StoredExpert:
        if name not in list(self):
            raise KeyError(f"{self.directory} has no expert {name!r}{did_you_mean(name, self)}")
        return open_expert(self.directory / name, self._base)

    def __iter__(self) -> Iterator[str]:
        return (entry.name for entry in sorted(self.directory.iterdir()) if _problem(entry) is None)

    def readable(self, adapters: bool = True) -> Iterator[StoredExpert]:
        """Yield the experts, and warn of each that cannot be opened; `adapters` of PEFT may stay closed."""
        for name in self:
            if adapters or not is_adapter(self.directory / name):
                try:
                    yield open_expert(self.directory / name, self._base)
                except (OSError, ValueError) as error:
                    log.warning("%s is skipped: %s", name, error)

    def incomplete(self) -> dict[str, str]:
        """Return the directories that look like an expert but cannot be opened as one, by name, with the reason.

        Names with a leading dot are left out: they are being written, or were when their writer was killed.
        """
        problems = {
            entry.name: _problem(entry) for entry in sorted(self.directory.iterdir()) if _has_any(entry, *_FILES)
        }
        return {name: problem for name, problem in problems.items() if problem and not name.startswith(".")}

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"Library({str(self.directory)!r}, {list(self)})"


_FILES = (RECORD_FILE, DELTA_FILE, STATE_FILE)


def _has_any(entry: Path, *names: str) -> bool:
    return any((entry / name).is_file() for name in names)


def _problem(entry: Path) -> str | None:
    """Return why a directory cannot be opened as an expert; `open_expert` checks the files that its record lists."""
    if not (is_adapter(entry) or _has_any(entry, RECORD_FILE)):
        return f"{RECORD_FILE} is missing"
    if not (is_adapter(entry) or _has_any(entry, DELTA_FILE, STATE_FILE)):
        return f"{DELTA_FILE} is missing"
    if entry.is_symlink():
        return "it is a link, and links are not followed"
    return None if is_name(entry.name) else "its name is not a valid name of an expert"
