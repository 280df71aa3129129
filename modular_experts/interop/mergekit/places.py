"""Places: where in the layers each weight is, by its name.

mergekit counts the layers of each output slice from 0 to 1. What belongs to no layer - embeddings, but also the final
norm and the head - stands at 0, so a gradient gives the head its first value. That is kept here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from modular_experts.text import depth_of

__all__ = ["Place", "places"]

_BEFORE_THE_LAYERS = re.compile(r"emb(?!ed_out)|\bwte\b|\bwpe\b|\bshared\b|rotary|\bln_pre\b")


@dataclass(frozen=True)
class Place:
    """Where a weight is.

    Attributes:
        slice: Number of the output slice whose sources and parameters are its own.
        share: Its place in the layers of that slice, from 0 at the first to 1 at the last.
    """

    slice: int
    share: float


def places(names: Iterable[str], slices: Sequence[tuple[int, int] | None]) -> dict[str, Place]:
    """Return the place of each weight.

    Args:
        names: All weights of the model.
        slices: First layer of each slice, and the one after its last; None for one slice of all layers.

    Raises:
        ValueError: The slices do not end with the model's last layer.
    """
    layers = {name: depth_of(name) for name in names}
    count = 1 + max((layer for layer in layers.values() if layer is not None), default=-1)
    spans = [span or (0, count) for span in slices]
    if spans[-1][1] != count:
        raise ValueError(
            f"the slices end before layer {spans[-1][1]} and the models have {count} layers; "
            "only merges that keep all layers, each in its place, are supported"
        )
    return {name: _place(name, layer, spans) for name, layer in layers.items()}


def _place(name: str, layer: int | None, spans: Sequence[tuple[int, int]]) -> Place:
    if layer is None:
        return Place(0 if _BEFORE_THE_LAYERS.search(name) else len(spans) - 1, 0.0)
    number = next(number for number, (_, end) in enumerate(spans) if layer < end)
    start, end = spans[number]
    return Place(number, (layer - start) / (end - start - 1) if end - start > 1 else 1.0)
