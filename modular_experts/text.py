"""Read and write the texts that people see: near names for a misspelt one, sizes in bytes, parts of weights' names."""

import difflib
import re
from collections.abc import Iterable

_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def nearest(name: object, known: Iterable[object], cutoff: float = 0.6) -> str | None:
    """Return the known name that is most like `name`, or None; `cutoff` tells how alike, from 0 to 1 (equal)."""
    spelt = {str(word).lower(): str(word) for word in known}
    found = difflib.get_close_matches(str(name).lower(), list(spelt), n=1, cutoff=cutoff)
    return spelt[found[0]] if found else None


def did_you_mean(name: object, known: Iterable[object], cutoff: float = 0.6) -> str:
    """Return `; did you mean x?` for the end of an error's sentence, or an empty string if no known name is near."""
    near = nearest(name, known, cutoff)
    return f"; did you mean {near}?" if near else ""


def block_of(name: str) -> str | None:
    """Return the transformer block that a weight belongs to, such as `model.layers.3`, or None outside of blocks."""
    # The part of the weight's full name up to the first number between dots.
    found = re.match(r".*?\.\d+(?=\.)", name)
    return found[0] if found else None


def depth_of(name: str) -> int | None:
    """Return the number of the transformer block that a weight belongs to, or None outside of the blocks."""
    block = block_of(name)
    return None if block is None else int(block.rpartition(".")[2])


def in_any_block(name: str) -> str:
    """Return a weight's name with a star for each number between dots or in brackets, alike in all blocks."""
    return re.sub(r"\[\d+\]", "[*]", re.sub(r"\.\d+\.", ".*.", name))


def bytes_text(size: float) -> str:
    """Return a size in bytes, such as `42.1 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:  # from here three digits would show 1e+03
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def score_text(score: object) -> str:
    """Return a score of a record: a number to four digits, or several by name."""
    if isinstance(score, dict):
        return ", ".join(f"{name} {score_text(value)}" for name, value in score.items())
    return f"{score:.4g}" if isinstance(score, float) else str(score)


def bytes_of(text: str | int) -> int:
    """Parse a size such as `2GB` or `512 MiB`, or a number of bytes."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([KMGT]?I?)B?\s*", str(text).upper())
    size = float(found[1]) * _UNITS.get(found[2], 0) if found else 0
    if not 1 <= size < float("inf"):
        raise ValueError(f"{text!r} is not a size; write one such as 2GB or 512MiB, or a number of bytes")
    return int(size)
