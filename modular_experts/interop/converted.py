"""Make an expert of a PEFT adapter wherever a command expects an expert; `library/opening.py` asks for it.

The expert is written once, into `$XDG_CACHE_HOME/modular-experts/adapters`, with all checks of `import_expert`. It
counts for the same files of the adapter and the same base; other contents become another expert.
"""

import hashlib
import json
import logging
import os
from pathlib import Path

import modular_experts
from modular_experts.base import Base
from modular_experts.base.files import cache_directory, found_or_fetched
from modular_experts.interop.import_expert import import_expert, name_for, open_base
from modular_experts.interop.peft.files import ADAPTER_FILES, CONFIG_FILE, AdapterFiles
from modular_experts.library import StoredExpert, open_expert
from modular_experts.library.record import RECORD_FILE
from modular_experts.library.tensorfile import file_hash
from modular_experts.text import bytes_text

log = logging.getLogger(__name__)


def converted(place: str | Path, base: str | Path | Base | None = None) -> StoredExpert:
    """Open the expert that a PEFT adapter becomes; it is converted at the first time, and the log tells it."""
    directory = _find(place)
    adapter = AdapterFiles(directory)
    name = name_for(place)
    try:
        opened_base = open_base(place, adapter, None, None) if base is None else Base.open(base)
    except FileNotFoundError as error:
        if base is not None:
            raise
        raise FileNotFoundError(
            f"{place} is a PEFT adapter, and the base that it names did not open; name it with `base=`, or import "
            f"the adapter once as an expert, with `source={place}`, `base=DIR` and `out=library/{name}` ({error})"
        ) from error
    local = Path(opened_base.place).expanduser()
    whole = Base(
        os.path.abspath(local) if local.is_dir() else opened_base.place, opened_base.directory, opened_base.revision
    )
    content = [file_hash(directory / CONFIG_FILE), file_hash(adapter.existing_file()), whole.fingerprint, whole.place]
    key = hashlib.sha256(json.dumps([*content, modular_experts.__version__]).encode()).hexdigest()[:16]
    target = cache_directory("adapters") / key / name
    if not (target / RECORD_FILE).is_file():
        # Where two processes convert at the same time, the second replaces the same expert.
        expert = import_expert(directory, target, whole, overwrite=True, called=str(place))
        size = bytes_text(expert.size_on_disk)
        log.warning(
            "%s is a PEFT adapter; the expert of %s made from it is in %s (%s)", place, opened_base.place, target, size
        )
    opened = open_expert(target)
    opened.place = place
    return opened


def _find(place: str | Path) -> Path:
    advice = "give the directory of an expert or of a PEFT adapter, or an adapter's hub id while the hub is reachable"
    directory = found_or_fetched("expert", str(place), None, [*ADAPTER_FILES, f"*/{RECORD_FILE}"], advice)
    if not (directory / CONFIG_FILE).is_file():
        names = sorted(file.parent.name for file in directory.glob(f"*/{RECORD_FILE}"))
        reason = (
            f"it holds the experts {', '.join(names[:8])}, which `pull` fetches with `repo={place}` and `out=library`"
        )
        raise ValueError(f"{place} on the hub is no PEFT adapter: {reason if names else f'it has no {CONFIG_FILE}'}")
    return directory
