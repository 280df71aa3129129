"""Add experts to their base: on disk, as an ordinary checkpoint, and in memory, for good or for a while.

Deltas are simply added up; to average them or to settle conflicts between them, merge first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from modular_experts.base.base import Base, DType
from modular_experts.base.files import MANIFEST
from modular_experts.base.structure import Structure
from modular_experts.base.verify import Check
from modular_experts.deltas import Delta, add
from modular_experts.deltas.task_vector import Sum, TaskVector
from modular_experts.library import as_parents, check_target, open_experts, parent_ids, union_of_weights
from modular_experts.progress import Progress

__all__ = ["applied", "apply", "apply_deltas"]


def apply(
    experts: Sequence[str | Path],
    out: str | Path,
    base: str | Path | Base | None = None,
    revision: str | None = None,
    dtype: DType | None = None,
    tolerance: float = 1e-3,
    overwrite: bool = False,
    progress: Progress = iter,
    verify: bool = True,
) -> Check | None:
    """Write the base plus the sum of the experts' deltas as a full checkpoint, and verify it by loading it again.

    Args:
        experts: Directories of the experts; their deltas are added up.
        out: Directory of the checkpoint.
        base: The base's directory or hub id; what the experts' records name if not given.
        revision: Branch, tag or commit of a hub id.
        dtype: Data type of the checkpoint; the base's own if not given.
        tolerance: Largest accepted difference of a logit between the model in memory and the reloaded one.
        overwrite: Replace a checkpoint of ours that is there.
        progress: Iterator wrapper, e.g. `tqdm`.
        verify: Hold the model in memory, load the result again and compare; without it, one weight at a time is in
            memory.

    Raises:
        FileExistsError: `out` is there and may not be replaced; nothing has been read yet.
        ValueError: The base is not the one the experts were trained on, a weight does not fit, or the reloaded
            checkpoint differs; nothing is written then.
    """
    check_target(out, overwrite, MANIFEST)
    opened = open_experts(experts)
    union_of_weights(opened)
    parents = as_parents(opened)
    return Base.open(base, opened, revision).write(
        Sum(opened),
        out,
        dtype,
        verify,
        tolerance,
        overwrite,
        progress,
        origin={"experts": parents},
        key=json.dumps(parent_ids(parents)),
    )


@torch.no_grad()
def apply_deltas(model: nn.Module, experts: Sequence[Mapping[str, Delta]], progress: Progress = iter) -> None:
    """Add the sum of experts to a model in place: taken in float32, rounded once to the dtype of each weight.

    Args:
        model: A model with the weights that the experts name, before experts are injected.
        experts: Name and delta of each weight, such as opened library experts.
        progress: Iterator wrapper, e.g. `tqdm`.

    Raises:
        ValueError: A weight does not exist, has another shape, or is tied to another one; nothing has been added then.
    """
    shapes: dict[str, torch.Size] = {}
    for expert in experts:
        if isinstance(expert, TaskVector):
            shapes |= expert.shapes()
        else:
            shapes |= {name: delta.shape for name, delta in expert.items()}
    Structure(model).check_fit(shapes)
    for name in progress(sorted(shapes)):
        weight = model.get_parameter(name)
        delta = add([expert[name] for expert in experts if name in expert])
        delta.to(weight.device).add_to(weight)


@contextmanager
def applied(model: nn.Module, experts: Sequence[Mapping[str, Delta]], scale: float = 1.0) -> Iterator[None]:
    """Add experts to a model for a while; afterwards every weight is what it was, bit for bit.

    So many merges, or many scales of one, can be measured on one loaded model. A copy of each moved weight is held.

    Args:
        model: As for `apply_deltas`.
        experts: Name and delta of each weight, such as opened library experts.
        scale: Factor of all deltas.
    """
    moved = {name for expert in experts for name in expert}
    before = {name: weight.detach().clone() for name, weight in model.named_parameters() if name in moved}
    try:
        apply_deltas(model, [{name: expert[name] * scale for name in expert} for expert in experts])
        yield
    finally:
        with torch.no_grad():
            for name, weight in before.items():
                model.get_parameter(name).copy_(weight)
