"""Save the experts of a model, however it was trained: `save_expert(model, "library/x", tasks=["intents"])`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from modular_experts.base import Base
from modular_experts.deltas import add
from modular_experts.injection.inject import describe_experts, expert_layers, expert_state, named_experts, task_vector
from modular_experts.library import (
    StoredExpert,
    as_parents,
    check_target,
    make_record,
    open_expert,
    open_experts,
    write_expert,
)


def save_expert(
    model: nn.Module,
    path: str | Path,
    tasks: Sequence[str] = (),
    base: str | Path | Base | None = None,
    applied: Sequence[str | Path] = (),
    scores: Mapping[str, Any] | None = None,
    hyperparameters: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    seed: int | None = None,
) -> StoredExpert:
    """Write what the experts of a transformers model have learned, in any training loop, into a library; open it.

    Args:
        model: A model after `inject`; its weights have the base's names.
        path: Directory of the expert, `<library>/<name>`.
        tasks: Names of the tasks that it was trained on.
        base: Directory or hub id of the base; where the model was loaded from if not given.
        applied: Library experts that were added to the base before `inject`; the new expert stands on top of them.
        scores: Numbers for the record, by name.
        hyperparameters: Settings of the training for the record, beside the experts' own.
        overwrite: Replace an expert of this name.
        seed: Seed of the training.

    Raises:
        FileExistsError: An expert of this name is there and may not be replaced.
        ValueError: The model has no experts, or the base is not known or not the model's.
    """
    layers = dict(expert_layers(model))
    if not named_experts(model):
        raise ValueError("the model has no experts to save; put them in before training, by inject(model, ...)")
    check_target(path, overwrite)
    place = base or getattr(getattr(model, "config", None), "_name_or_path", None)
    if not place:
        raise ValueError("the model does not know where it was loaded from; name its base, such as base='models/small'")
    parents = open_experts(applied) if applied else []
    opened = Base.open(place, parents)
    opened.structure.check_fit({name: layer.weight.shape for name, layer in layers.items()}, "the trained model")

    def anchor(name: str) -> Tensor:
        weight = opened.weight(name).to(layers[name].base_dtype)
        moved = [parent[name] for parent in parents if name in parent]
        return add(moved).add_to(weight.clone()) if moved else weight

    facts = describe_experts(model)
    record = make_record(
        **facts | {"hyperparameters": facts["hyperparameters"] | dict(hyperparameters or {})},
        base={"id": opened.place, "revision": opened.revision, "fingerprint": opened.fingerprint},
        tasks=tasks,
        scores=scores,
        parents=as_parents(parents),
        seed=seed,
    )
    write_expert(path, task_vector(model, anchor), record, overwrite, state=expert_state(model))
    return open_expert(path)
