"""Add experts to their base: on disk, as an ordinary checkpoint, and in memory, for good or for a while."""

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from copy import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from modular_experts.base.base import Base, DType, Origin, find_base
from modular_experts.base.files import MANIFEST, fetch
from modular_experts.base.quantised import is_quantised
from modular_experts.base.structure import Structure, is_rounded, weight_of
from modular_experts.base.verify import Check
from modular_experts.deltas import Delta, add
from modular_experts.deltas.task_vector import Sum, TaskVector
from modular_experts.library import (
    StoredExpert,
    as_parents,
    check_target,
    common_base,
    open_expert,
    open_experts,
    parent_ids,
)
from modular_experts.library.compatibility import check_mergeable
from modular_experts.library.expert import stored_experts_of
from modular_experts.library.state import is_of_task_head
from modular_experts.progress import Progress

log = logging.getLogger(__name__)

AnyExpert = str | Path | Mapping[str, Delta]
"""What `open_expert` takes, an opened expert, or any mapping from weight names to deltas."""

_IN_PLACE = "_modular_experts_applied"
"""The attribute of a model that lists the experts applied to it, the first first."""


def apply(
    experts: str | Path | StoredExpert | Sequence[str | Path | StoredExpert],
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

    The other arguments are as for `Base.open` and `Base.write`, and so are its errors.

    Args:
        experts: Directories of the experts, or opened experts; their deltas are added up.
        out: Directory of the checkpoint.
        base: The base's directory or hub id; what the experts' records name if not given.
    """
    check_target(out, overwrite, MANIFEST)
    opened = open_experts(experts, base=base)
    if any(is_of_task_head(name) for expert in opened for name in expert.state_names):
        log.warning("the checkpoint has no task heads: they stay with the experts, in the library")
    parents = as_parents(opened)
    return Base.open(base, opened, revision).write(
        Sum(opened),
        out,
        dtype,
        verify,
        tolerance,
        overwrite,
        progress,
        Origin({"experts": parents}, json.dumps(parent_ids(parents))),
    )


def check_shapes(model: nn.Module | Structure, experts: Sequence[Mapping[str, Delta]]) -> None:
    """Raise ValueError if a model lacks a weight that an expert moves, has another shape for it, or ties it."""
    structure = model if isinstance(model, Structure) else Structure(model)
    for expert in experts:
        shapes = expert.shapes() if isinstance(expert, TaskVector) else {n: d.shape for n, d in expert.items()}
        if not isinstance(expert, StoredExpert):
            structure.check_fit(shapes)
            continue
        structure.check_fit(shapes, expert.name)
        untied = expert.record["base"].get("untied")
        if untied and untied["embeddings"] in expert:
            structure.check_untied(untied["embeddings"], expert.name)


@torch.no_grad()
def apply_deltas(model: nn.Module, experts: Sequence[Mapping[str, Delta]]) -> None:
    """Add the sum of experts to a model in place: taken in float32, rounded once to the dtype of each weight.

    Args:
        model: A model with the weights that the experts name, before experts are injected.
        experts: Name and delta of each weight, such as opened library experts.

    Raises:
        ValueError: A weight does not exist, has another shape, or is tied to another one; nothing has been added then.
    """
    check_shapes(model, experts)
    if quantised := moved_quantised(model, experts):
        raise ValueError(
            f"{quantised[0]} is quantised, so a delta cannot be written into it; injection.attach.attached adds it "
            "beside the weight"
        )
    for name in sorted({name for expert in experts for name in expert}):
        weight = weight_of(model, name)
        delta = add([expert[name] for expert in experts if name in expert])
        delta.to(weight.device).add_to(weight)


def moved_quantised(model: nn.Module, experts: Sequence[Mapping[str, Delta]]) -> list[str]:
    """Return the names of the quantised weights that experts move."""
    moved = dict.fromkeys(name for expert in experts for name in expert)
    quantised = {f"{name}.weight" for name, layer in model.named_modules() if is_quantised(layer)}
    return [name for name in moved if name in quantised]


class Applied:
    """Experts that are added to a model until `remove`, or until the end of a `with` block.

    Remove the last of several on one model first: each brings back the weights that it found. `after_removal` is closed
    by `remove`.
    """

    def __init__(self, model: nn.Module, before: Mapping[str, Tensor]) -> None:
        self._model = model
        self._before = dict(before)
        self.after_removal = ExitStack()
        # The model's own attribute, so that both are freed together and a copy of the model knows what it holds.
        model.__dict__.setdefault(_IN_PLACE, []).append(self)

    @torch.no_grad()
    def remove(self) -> None:
        """Restore every weight, bit for bit; a second call does nothing.

        Raises:
            ValueError: Experts that were added later are still in the model.
        """
        standing = self._model.__dict__.get(_IN_PLACE, [])
        if self not in standing:
            return
        if self is not standing[-1]:
            raise ValueError("experts that were added later are still in the model; remove those first")
        for name, weight in self._before.items():
            weight_of(self._model, name).copy_(weight)
        self._before = {}
        standing.pop()
        if not standing:
            del self._model.__dict__[_IN_PLACE]
        self.after_removal.close()

    def __enter__(self) -> "Applied":
        return self

    def __exit__(self, *failure: object) -> None:
        self.remove()


def applied(
    model: nn.Module, experts: AnyExpert | Sequence[AnyExpert], scale: float = 1.0, check: bool = True
) -> Applied:
    """Add experts to a model for a while; afterwards every weight is as it was, bit for bit.

        with applied(model, "library/a", scale=0.5):
            ...

    One `applied` inside of another adds to it.

    Args:
        model: As for `apply_deltas`.
        experts: One or several, which are added up: directories of a library, opened experts, or mappings from weight
            names to deltas.
        scale: Factor of all deltas.
        check: Whether the model must be the base of the stored experts, as `check_loaded` finds out.

    Raises:
        ValueError: The model is not the experts' base, an expert is not mergeable, or a weight does not fit; nothing
            has been added then.
    """
    opened = open_several(experts)
    check_mergeable(stored_experts_of(opened))
    if check:
        check_loaded(model, opened)
    moved = {name for expert in opened for name in expert}
    check_shapes(model, opened)
    on_model = Applied(model, {name: weight_of(model, name).detach().clone() for name in sorted(moved)})
    try:
        apply_deltas(model, [{name: expert[name] * scale for name in expert} for expert in opened])
    except BaseException:
        on_model.remove()
        raise
    return on_model


def open_several(
    experts: AnyExpert | Sequence[AnyExpert], base: str | Path | Base | None = None
) -> list[Mapping[str, Delta]]:
    several = [experts] if isinstance(experts, str | Path | Mapping) else experts
    opened = [expert if isinstance(expert, Mapping) else open_expert(expert, base) for expert in several]
    # A larger base moves the copy, and the caller's expert stays with its own.
    return [copy(expert) if isinstance(expert, StoredExpert) else expert for expert in opened]


def check_loaded(model: nn.Module, experts: Sequence[Mapping[str, Delta]]) -> None:
    """Refuse a model in memory whose weights are not those that the experts' deltas start from.

    Evenly spaced rows of each weight that an expert moves are compared with the stored base; a weight that `applied`
    has moved counts as it was before. If the base is not on this machine, a warning is logged instead.

    Raises:
        ValueError: A weight of the model, which has no experts injected yet, differs from the experts' base.
    """
    stored = stored_experts_of(experts)
    if not stored:
        return
    recorded = common_base(stored)
    base = None
    for place in dict.fromkeys([str(getattr(model, "name_or_path", "")), find_base(stored)]):
        if base is not None or not place:
            continue
        with suppress(OSError, ValueError):
            local = Base(place, fetch(place, recorded.get("revision"), local_only=True))
            if local.fingerprint == recorded["fingerprint"]:
                base = local
    if base is None:
        text = "the base of %s (%s) is not on this machine, so the model's weights were not compared with it"
        log.warning(text, stored[0].name, recorded.get("id"))
        return
    Base.open(base, stored)
    moved = dict.fromkeys(name for expert in stored for name in expert)
    known: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for earlier in reversed(model.__dict__.get(_IN_PLACE, [])):
        known |= earlier._before  # what the weights were before `applied` moved them
    for name, step, rows in base.sample(name for name in moved if name in known):
        rounded = is_rounded(model.get_submodule(name.rpartition(".")[0]), rows, step)
        if rounded is None and rows.shape[1:] == known[name].shape[1:]:
            rounded = _same(known[name].detach()[::step].cpu(), rows)
        if rounded is False:
            raise ValueError(
                f"{name} of the model is not what it is in {base.place}, on which {stored[0].name} was trained; load "
                "that base again, add several experts in one call, or go on with check=False"
            )


def _same(held: Tensor, stored: Tensor) -> bool:
    for dtype in dict.fromkeys([held.dtype, torch.bfloat16, torch.float16]):
        narrow = held.to(dtype)
        if torch.equal(narrow.to(held.dtype), held) and torch.equal(narrow, stored.to(dtype)):
            return True
    return False
