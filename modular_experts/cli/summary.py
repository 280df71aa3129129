"""Summary: how an expert is told in one line, and numbers in few characters."""

from __future__ import annotations

from modular_experts.library import StoredExpert

__all__ = ["bytes_text", "kept_share", "share_text", "summary"]


def summary(expert: StoredExpert) -> str:
    """Return kind, number of weights, kept share and size on disk in one line."""
    return (
        f"{expert.record['kind']}, {len(expert)} weights, {share_text(kept_share(expert))} of their entries kept, "
        f"{bytes_text(expert.size_on_disk)}"
    )


def kept_share(expert: StoredExpert) -> float:
    """Return the share of the entries of an expert's weights that it keeps."""
    total = sum(shape.numel() for shape in expert.shapes().values())
    return sum(expert.kept_entries().values()) / total if total else 0.0


def share_text(share: float) -> str:
    """Return a share in per cent, such as `5 %` or `0.013 %`."""
    return f"{100 * share:.3g} %"


def bytes_text(size: float) -> str:
    """Return a size in bytes, such as `42.1 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
