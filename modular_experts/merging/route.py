"""Make a routed expert of experts in a library; `injection/attach.py` puts it into a model."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from modular_experts.base import Base, DType
from modular_experts.data import TaskMixture
from modular_experts.injection.attach import COUNT, ENCODER, MODEL, describe_router, fingerprint_tensor
from modular_experts.injection.routed import by_weight
from modular_experts.library import (
    StoredExpert,
    as_parents,
    check_target,
    common_base,
    make_record,
    open_expert,
    open_experts,
    open_statistics,
    write_expert,
)
from modular_experts.library.compatibility import check_act_alike, found_beside, put_beside, union_of_weights
from modular_experts.library.described import class_path, trust
from modular_experts.library.record import ROUTED
from modular_experts.library.statistics import StoredStatistics, command_for, kinds_of_statistics
from modular_experts.merging.objective import ValidationRows
from modular_experts.merging.statistics import ENCODER_NAME, GRAMS_NAME, name_of, take_statistics
from modular_experts.progress import Progress
from modular_experts.routing import DEFAULT_ROUTER, Mixture, Router
from modular_experts.routing.router import check_fallback, encoder_of


def route(
    experts: Sequence[str | Path | StoredExpert],
    out: str | Path,
    router: Router | None = None,
    fallback: str | Path | StoredExpert | None = None,
    data: TaskMixture | None = None,
    rows: int = 256,
    overwrite: bool = False,
    progress: Progress = iter,
    base: str | None = None,
    dtype: DType | None = None,
) -> StoredExpert:
    """Let a router learn some experts, and write both as one routed expert: the router's state, and the experts' names
    and content hashes.

    Args:
        experts: Directories of the experts; the fallback among them counts as the fallback alone.
        out: Directory of the routed expert. Experts of another library are put beside it, without a second copy on the
            disk where that is possible.
        router: The router; `KernelRidge` with its defaults if not given.
        fallback: An expert, such as a merge, for inputs that the router rejects; the base alone if not given.
        data: The experts' tasks, from whose rows a router learns that needs statistics which were not taken yet; if
            not given, it learns from the inputs that the experts keep.
        rows: The most rows of one task.
        overwrite: Replace an expert of this name.
        progress: Iterator wrapper around the experts whose statistics are taken, e.g. `tqdm`.
        base: The base's directory or hub id; the one in the experts' records by default.
        dtype: Data type of the base where statistics are taken; float32 if not given.

    Raises:
        FileExistsError: An expert of this name is there and may not be replaced, or a name of another library is
            another expert there.
        ValueError: An expert has another base or does more than its delta, only some act on answers alone, there are
            too few, two of the experts and the routed one have one name, the router would never use the fallback, or
            there are neither data nor statistics to learn from.
    """
    target = check_target(out, overwrite)
    router = router or DEFAULT_ROUTER()
    check_fallback(router, fallback.path if isinstance(fallback, StoredExpert) else fallback)
    behind = [] if fallback is None else [fallback]
    left_out = [_path_of(place) for place in (out, *behind)]
    chosen = [expert for expert in experts if _path_of(expert) not in left_out]
    opened = open_experts(chosen, base=base, on_answers=True)
    members = list(opened)
    if behind:
        members += open_experts(behind, base=base, on_answers=True)
    check_act_alike(members)
    _check_names(members, target)
    common = common_base(members)
    union_of_weights(members)
    router.select.check(len(opened))
    _take_missing(router, opened, ValidationRows(data, rows, base, dtype=dtype), progress)
    # Whoever gives the router trusts its code.
    trust(type(router), type(router.select))
    state = _learned_state(router, opened, base)
    record = make_record(
        ROUTED,
        common,
        hyperparameters=describe_router(router),
        tasks=list(dict.fromkeys(task for expert in opened for task in expert.record["tasks"])),
        parents=as_parents(members),
        class_path=class_path(type(router)),
        not_mergeable_because=Mixture.not_mergeable_because,
    )
    for expert in members:
        if expert.path.parent != target.parent:
            put_beside(expert, target.parent / expert.name)
    write_expert(target, {}, record, overwrite, state=state)
    return open_expert(target)


def _path_of(expert: str | Path | StoredExpert) -> str:
    return os.path.abspath(expert.path if isinstance(expert, StoredExpert) else expert)


def _check_names(members: Sequence[StoredExpert], target: Path) -> None:
    """Refuse names that would meet in the library of the routed expert."""
    first: dict[str, StoredExpert] = {}
    for expert in members:
        if expert.name == target.name:
            raise ValueError(
                f"{expert.path} and the routed expert {target} are to lie side by side, and have one name; give out "
                "another name"
            )
        if first.setdefault(expert.name, expert).content_hash != expert.content_hash:
            raise ValueError(
                f"{first[expert.name].path} and {expert.path} are to lie side by side, and have one name; rename the "
                "directory of one of them"
            )
        if expert.path.parent != target.parent:
            found_beside(expert, target.parent / expert.name)


def _take_missing(router: Router, experts: Sequence[StoredExpert], rows: ValidationRows, progress: Progress) -> None:
    """Take the statistics that the router needs, and experts lack."""
    kind = router.needs
    if kind is None:
        return
    lacking = without_statistics(experts, router)
    if lacking and rows.data is None and not all(expert.keeps_inputs for expert in lacking):
        raise ValueError(
            f"{len(lacking)} of {len(experts)} experts have no {kind} statistics, which {type(router).__name__} learns "
            "from; give the tasks of all: `tasks=['a.jsonl', 'b.jsonl']`"
        )
    if lacking:
        # Statistics without the encoder's vectors are replaced by the same ones with them.
        encoder = encoder_of(router)
        take_statistics(lacking, kind, rows, encoder is not None, progress, encoder=encoder)


def without_statistics(experts: Sequence[StoredExpert], router: Router) -> list[StoredExpert]:
    """Return the experts that lack statistics that a router needs, or in these the vectors of the router's encoder."""
    kind = str(router.needs)
    taken = [expert for expert in experts if kind in kinds_of_statistics(expert)]
    if encoder := encoder_of(router):
        wanted = Base.open(encoder).fingerprint
        taken = [expert for expert in taken if open_statistics(expert, kind).facts["data"].get(ENCODER_NAME) == wanted]
    return [expert for expert in experts if expert not in taken]


def _learned_state(router: Router, experts: Sequence[StoredExpert], base: str | None) -> dict[str, Tensor]:
    """Let the router learn; return its tensors, and how many of the parents it chooses among.

    They lie under `MODEL`, or for scope `linear` under the name of each weight.
    """
    router.hear_tasks([list(map(str, expert.record["tasks"])) for expert in experts])
    taken = [open_statistics(expert, router.needs) for expert in experts] if router.needs else []
    if router.scope == "sample":
        # There are no statistics for a router that needs none.
        prompts = [_prompts(statistics, expert, router) for statistics, expert in zip(taken, experts, strict=False)]
        router.learn([None for _ in experts], prompts)
        routers = {MODEL: router}
    else:
        # Only the base tells how its layers keep their weights.
        routers = by_weight(router, Base.open(base, experts).structure.model, experts, taken)
    state: dict[str, Tensor] = {}
    for place, learned in routers.items():
        state |= {f"{place}/{name}": tensor for name, tensor in learned.state().items()}
    state[f"{MODEL}/{COUNT}"] = torch.tensor(len(experts))
    if encoder := encoder_of(router):
        state[f"{MODEL}/{ENCODER}"] = fingerprint_tensor(Base.open(encoder).fingerprint)
    return state


def _prompts(statistics: StoredStatistics, expert: StoredExpert, router: Router) -> Tensor:
    """Return what the router reads of an expert's prompts, `(rows, size)`, as a forward pass gives it."""
    names = list(map(name_of, router.depths))
    if encoder_of(router):
        names.append(ENCODER_NAME)
    if router.reads_grams:
        names.append(GRAMS_NAME)
    parts = []
    for name in names:
        vectors = statistics.get(name)
        if vectors is None:
            raise ValueError(
                f"{statistics.file} has {', '.join(statistics)}, and no {name}, which {type(router).__name__} reads; "
                "choose depths that are there, or take them anew: "
                + command_for([expert], str(router.needs), overwrite=True)
            )
        parts.append(vectors.values)
    return torch.cat(parts, 1)
