"""Save the experts of a model, however it was trained: `save_expert(model, "library/x", tasks=["intents"])`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from modular_experts.base import Base
from modular_experts.base.structure import Structure
from modular_experts.deltas import add
from modular_experts.experts.expert import Trained
from modular_experts.injection.answer_only import NOT_MERGEABLE_BECAUSE
from modular_experts.injection.inject import expert_layers, expert_state, named_experts, task_vector
from modular_experts.injection.task_heads import TaskHeads
from modular_experts.language_model import acts_on_answers
from modular_experts.library import (
    StoredExpert,
    as_parents,
    check_target,
    make_record,
    open_expert,
    open_experts,
    write_expert,
)
from modular_experts.library.described import class_path
from modular_experts.library.record import ANSWER, Facts, Record


def anchor(base: Base, applied: Sequence[StoredExpert], dtype: torch.dtype, name: str) -> Tensor:
    """Read a base weight from its file and add the applied experts, as before training."""
    weight = base.weight(name).to(dtype)
    moved = [expert[name] for expert in applied if name in expert]
    return add(moved).add_to(weight.clone()) if moved else weight


def save_expert(
    model: nn.Module,
    path: str | Path,
    tasks: Sequence[str] = (),
    base: str | Path | Base | None = None,
    applied: Sequence[str | Path] = (),
    scores: Mapping[str, float] | None = None,
    hyperparameters: Facts | None = None,
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
        hyperparameters: Settings of the training for the record.
        seed: Seed of the training for the record.
        overwrite: Replace an expert of this name.

    Raises:
        FileExistsError: An expert of this name is there and may not be replaced.
        ValueError: The model has no experts, or the base is not known or not the model's.
    """
    if not named_experts(model):
        raise ValueError("the model has no experts to save; put them in before training, by inject(model, ...)")
    check_target(path, overwrite)
    place = base or place_of_model(model)[0]
    if not place:
        raise ValueError("the model does not know where it was loaded from; name its base, such as base='models/small'")
    parents = open_experts(applied) if applied else []
    opened = Base.open(place, parents)
    layers = dict(expert_layers(model))
    shapes = Structure(model).shapes
    opened.structure.check_fit({name: shapes[name] for name in layers}, "the trained model")

    def before(name: str) -> Tensor:
        return anchor(opened, parents, layers[name].base_dtype, name)

    facts = describe_experts(model)
    record = make_record(
        **facts | {"hyperparameters": facts["hyperparameters"] | dict(hyperparameters or {})},
        base=opened.facts,
        tasks=tasks,
        scores=scores,
        parents=as_parents(parents),
        seed=seed,
    )
    write_expert(path, task_vector(model, before), record, overwrite, state=expert_state(model))
    return open_expert(path)


def place_of_model(model: nn.Module) -> tuple[str, str | None]:
    """Return where `from_pretrained` loaded a model from, an empty text if that is not known, and its commit."""
    config: object = getattr(model, "config", None)
    # Private names of transformers 5.24.
    return str(getattr(config, "_name_or_path", "") or ""), getattr(config, "_commit_hash", None)


def describe_experts(model: nn.Module) -> Record:
    """Return what `library.make_record` takes: `kind`, `hyperparameters` and, for experts with a state, `class_path`
    and `not_mergeable_because`; a setting with several values is a list. If one `LayerPlan` made the experts, these
    describe the plan, and `plan` is there too; `acts_on` says that they act on answers alone.
    """
    types: dict[str, Trained] = {}
    values: dict[str, list[bool | int | float | str]] = {}
    plans: list[Record | None] = []
    for _, expert in named_experts(model):
        if isinstance(expert, TaskHeads):
            continue
        types.setdefault(type(expert).__name__, expert)
        if expert.made_by not in plans:
            plans.append(expert.made_by)
        for name, value in expert.settings().items():
            if value not in values.setdefault(name, []):
                values[name].append(value)
    if len(plans) == 1 and plans[0] is not None:
        plan = plans[0]
        facts: Record = {"kind": plan["class"].rpartition(".")[2], "hyperparameters": plan["settings"], "plan": plan}
    else:
        plain = {name: several[0] if len(several) == 1 else several for name, several in values.items()}
        facts = {"kind": "+".join(sorted(types)), "hyperparameters": plain}
    with_state = [types[name] for name in sorted(types) if types[name].state()]
    if with_state:
        reasons = [expert.not_mergeable_because for expert in with_state if not expert.mergeable]
        facts["class_path"] = "+".join(class_path(type(expert)) for expert in with_state)
        facts["not_mergeable_because"] = " and ".join(dict.fromkeys(reasons)) or None
    if acts_on_answers(model):
        facts |= {"acts_on": ANSWER, "not_mergeable_because": NOT_MERGEABLE_BECAUSE}
    return facts
